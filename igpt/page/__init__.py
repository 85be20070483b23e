"""`igpt demo`: a page in the browser where one plays with a model."""
