"""What is learned here: models that others go by."""
