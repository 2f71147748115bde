"""What a run looks like: text, pictures, the HTML page and the terminal. Nothing of it is loaded by this package itself."""
