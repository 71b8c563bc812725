"""How the model `emoji` of the package, and its judges, were made; see README.md."""
