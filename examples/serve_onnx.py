"""POST a 16 kHz WAV, get its embedding: serve_onnx.py encoder.onnx PORT"""

import io
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import onnxruntime
import soundfile

session = onnxruntime.InferenceSession(sys.argv[1])


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        wav, _ = soundfile.read(io.BytesIO(body), dtype="float32")
        embedding = session.run(None, {"waveform": wav[None]})[0][0]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(embedding.tolist()).encode())


server = HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
