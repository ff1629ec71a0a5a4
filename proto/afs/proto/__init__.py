"""Generated gRPC stubs and their .proto files."""
