"""Flask, for gunicorn: the model in each worker process, as its documentation deploys it."""

from flask import Flask, request


def minilm():
    from bare_model import MiniLM

    model, app = MiniLM(), Flask(__name__)

    @app.post("/embed")
    def embed():
        return {"embedding": model.embed([request.get_json()["text"]])[0].tolist()}

    return app


def noop():
    app = Flask(__name__)

    @app.post("/echo")
    def echo():
        return {"y": request.get_json()["x"]}

    return app
