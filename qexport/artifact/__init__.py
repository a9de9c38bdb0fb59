"""An artifact's folder: manifest, report, digests, publishing."""
