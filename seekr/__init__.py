"""The algorithms of SEEKR and its peers: pure functions of models, rows and seeds. No Ray, no storage."""
