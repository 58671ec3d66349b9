"""One file per method; the folder listing is the catalogue."""
