"""POST a WAV, get its embedding: serve_onnx.py encoder.onnx PORT"""

import io
import json
import sys
from wsgiref.simple_server import make_server

import onnxruntime
import soundfile

session = onnxruntime.InferenceSession(sys.argv[1])
wanted = int(session.get_modelmeta().custom_metadata_map["sample_rate"])


def embed(request, respond):
    body = request["wsgi.input"].read(int(request["CONTENT_LENGTH"] or 0))
    wav, rate = soundfile.read(io.BytesIO(body), dtype="float32")
    if (rate, wav.ndim) != (wanted, 1):
        respond("400 Bad Request", [("Content-Type", "text/plain")])
        return [f"{wanted} Hz mono is needed".encode()]
    embedding = session.run(None, {"waveform": wav[None]})[0][0]
    respond("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(embedding.tolist()).encode()]


server = make_server("127.0.0.1", int(sys.argv[2]), embed)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
