"""The Open Inference Protocol (KServe v2 over HTTP): parsing, schemas, serialisation."""
