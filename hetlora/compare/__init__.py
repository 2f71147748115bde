"""Comparisons of methods: their names, the runs, the figures, pictures and page. Nothing of it is loaded by this package itself."""
