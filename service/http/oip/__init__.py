"""The Open Inference Protocol (KServe v2 over HTTP): its JSON, its binary data, our tensors."""
