"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const data = JSON.parse(document.getElementById("data").textContent);

  function make(name, attributes, text) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  // sorting: missing values stay last in both directions, equal ones keep their order
  function compareCells(a, b, down) {
    if (a === "" || b === "") return (a === "") - (b === "");
    const numbers = [Number(a), Number(b)];
    const order = numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1];
    return down ? -order : order;
  }
  function sortBy(table, column, down) {
    const body = table.tBodies[0];
    const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
    [...body.rows].sort((a, b) => compareCells(value(a), value(b), down)).forEach((row) => body.append(row));
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button")?.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const first = head.classList.contains("num") ? "descending" : "ascending";
        const now = before === null ? first : before === "ascending" ? "descending" : "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", now);
        sortBy(table, column, now === "descending");
      });
    });
  }

  // a card that opens is a dialog: who cannot see it is taken into it (autofocus would act when the page loads)
  for (const card of document.querySelectorAll("[popover]")) {
    card.addEventListener("toggle", (event) => event.newState === "open" && card.querySelector(".close").focus());
  }

  for (const form of document.querySelectorAll("form.filters")) {
    const rows = [...form.parentElement.querySelectorAll("table.standings tbody tr")];
    const show = () => {
      const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
      const trust = form.elements.trust.value;
      let shown = 0;
      for (const row of rows) {
        const text = row.dataset.text.toLowerCase();
        const control = row.dataset.control === "1";
        const fits = words.every((word) => text.includes(word)) && (!trust || row.dataset.trust === trust)
          && (form.elements.controls.checked || !control);
        row.hidden = !fits;
        shown += fits;
      }
      form.querySelector(".count").textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
    };
    form.addEventListener("input", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    show();
  }

  function scores(packed) {
    const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float32Array.from({ length: bytes.length / 4 }, (_, n) => view.getFloat32(4 * n, true));
  }
  function pairOf(board, a, b) {
    const [high, low] = a > b ? [a, b] : [b, a];
    const found = board.pairs[(high * (high - 1)) / 2 + low];
    return found && { value: a > b ? found[0] : -found[0], half: found[1], seeds: found[2], p: found[3], none: found[0] === null };
  }
  const sign = (number) => (number > 0 ? "+" : number < 0 ? "−" : "") + Math.abs(number).toFixed(2);
  const signFine = (number) => (number > 0 ? "+" : number < 0 ? "−" : "") + Math.abs(number).toPrecision(3);

  function histogram(gaps, scale, unit) {
    const values = [...gaps].map((gap) => gap * scale);
    const most = Math.max(...values.map(Math.abs), 1e-9);
    const bins = 31, width = (2 * most) / bins, counts = new Array(bins).fill(0);
    for (const value of values) counts[Math.min(bins - 1, Math.max(0, Math.floor((value + most) / width)))] += 1;
    const top = Math.max(...counts), x = (value) => 30 + (580 * (value + most)) / (2 * most);
    const svg = make("svg", { viewBox: "0 0 640 220", role: "img" });
    svg.append(make("line", { class: "grid", x1: 30, x2: 610, y1: 180, y2: 180 }));
    counts.forEach((count, n) => {
      if (!count) return;
      const height = (160 * count) / top;
      svg.append(make("rect", { class: "bin", x: x(-most + n * width) + 1, width: 580 / bins - 2, y: 180 - height, height }));
    });
    svg.append(make("line", { class: "zero", x1: x(0), x2: x(0), y1: 12, y2: 184 }));
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    svg.append(make("line", { class: "mean", x1: x(mean), x2: x(mean), y1: 172, y2: 188 }));
    const places = [-most, -most / 2, 0, most / 2, most];
    for (const place of places) {
      svg.append(make("text", { class: "tick", x: x(place), y: 200, "text-anchor": "middle" }, unit === "points" ? place.toFixed(0) : place.toPrecision(2)));
    }
    svg.append(make("text", { class: "axis", x: 320, y: 217, "text-anchor": "middle" }, `difference in an episode, ${unit}`));
    return svg;
  }

  for (const figure of document.querySelectorAll("figure.compare")) {
    const board = data[figure.dataset.board];
    const [first, second] = figure.querySelectorAll("select");
    const out = figure.querySelector(".outcome"), place = figure.querySelector(".histogram");
    const update = () => {
      const a = Number(first.value), b = Number(second.value);
      place.replaceChildren();
      if (a === b) {
        out.textContent = "Choose two different methods.";
        return;
      }
      const names = [first, second].map((select) => select.selectedOptions[0].textContent);
      const scale = board.accuracy ? 100 : 1, unit = board.accuracy ? "points" : "error";
      const show = board.accuracy ? sign : signFine;
      const [mine, theirs] = [a, b].map((n) => scores(board.methods[n].scores));
      const gaps = mine.map((value, n) => value - theirs[n]);
      const pair = pairOf(board, a, b);
      const better = gaps.filter((gap) => (board.higher ? gap > 1e-6 : gap < -1e-6)).length;
      const equal = gaps.filter((gap) => Math.abs(gap) <= 1e-6).length;
      let text;
      if (!pair || pair.none) {
        text = `${names[0]} and ${names[1]} share no training seed, and one has too few for a test without: there is no difference to tell. `;
      } else {
        const bounds = pair.half === null ? "" : `, 95 % [${show((pair.value - pair.half) * scale)}, ${show((pair.value + pair.half) * scale)}]`;
        const over = pair.seeds === 0 ? "the seeds of each" : `${pair.seeds} shared seed${pair.seeds === 1 ? "" : "s"}`;
        text = `${names[0]} − ${names[1]}: ${show(pair.value * scale)} ${unit}${bounds}, over ${over} and ${gaps.length} episodes. `;
        if (pair.seeds === 1) text += "One seed says nothing about another training. ";
        if (pair.p === null && (board.methods[a].few || board.methods[b].few)) text += "Too few seeds to test. ";
        if (pair.p !== null) text += pair.p < 0.05 ? `Told apart (p = ${pair.p} after Holm over ${board.count} pairs). ` : `Not told apart after Holm over ${board.count} pairs (p = ${pair.p}). `;
      }
      text += `Means over seeds: ${names[0]} is better on ${better} episodes, equal on ${equal}, worse on ${gaps.length - better - equal}.`;
      out.textContent = text;
      const picture = histogram(gaps, scale, unit);
      picture.setAttribute("aria-label", `Histogram of the per-episode differences. ${text}`);
      place.append(picture);
    };
    figure.addEventListener("change", update);
    update();
  }
})();
