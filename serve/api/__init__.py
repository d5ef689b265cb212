"""HTTP: the Open Inference Protocol, OpenAI's surface and the documents; the only home of FastAPI and status codes."""
