"""Golden tests: what runs made when `expected.json` and `kept/` were recorded, they make today."""
