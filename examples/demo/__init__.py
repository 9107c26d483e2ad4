"""The demo: four string tasks, a tiny Llama, three methods."""
