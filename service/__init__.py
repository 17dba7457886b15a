"""solo-serve: an HTTP microservice for instance segmentation with SOLO."""
