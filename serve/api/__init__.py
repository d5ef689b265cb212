"""HTTP: the Open Inference Protocol, the OpenAI surface and the documents; the only home of FastAPI and of status codes."""
