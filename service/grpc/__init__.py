"""The Open Inference Protocol over gRPC: a second front end of the same segmenter."""
