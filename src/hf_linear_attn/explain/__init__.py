"""What models attend to, as numbers and pictures."""
