"""What reproduces papers and compares trained models: one recipe a file, `python -m reproduction RECIPE STAGE`; see README.md."""
