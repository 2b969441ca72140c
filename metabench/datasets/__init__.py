"""Data sets, one file each; `files` holds what those with files share."""
