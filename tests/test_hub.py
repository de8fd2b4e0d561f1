"""What the hub refuses, in words that say what to do: the real client against a server that answers like the hub."""

import http.server
import json
import os
import subprocess
import sys
import threading

import datasets
import httpx
import pytest
from transformers import PreTrainedConfig

from slimllm_nb.sources import SourceError, load_model, load_texts
from slimllm_nb.sources.hub import HUB_VARIABLE

# Repository -> what the hub answers, the revision asked for, and what is said.
REFUSED = {
    "owner/gated": (
        403,
        "GatedRepo",
        None,
        "it is gated: accept its licence at https://huggingface.co/owner/gated, then log in",
    ),
    "owner/other": (404, "RevisionNotFound", "abc", "it has no revision 'abc': give a commit, tag or branch"),
    "owner/private": (401, "RepoNotFound", None, "there is none, or it is private and no token is set"),
}
ASK = """
import json, sys
from slimllm_nb.sources import SourceError, load_model
for name, revision in json.loads(sys.argv[1]).items():
    try:
        load_model(name, revision=revision)
    except SourceError as error:
        print(error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Refuses every repository as the hub does."""

    def do_GET(self):
        code, error = next(answer[:2] for name, answer in REFUSED.items() if name in self.path)
        body = json.dumps({"error": error}).encode()
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("X-Error-Message", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_refused_by_the_hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    asked = json.dumps({name: revision for name, (_, _, revision, _) in REFUSED.items()})
    done = subprocess.run([sys.executable, "-c", ASK, asked], capture_output=True, text=True, env=environment)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    for printed, (name, (*_, message)) in zip(done.stdout.splitlines(), REFUSED.items(), strict=True):
        assert printed.startswith(f"cannot load the model '{name}': ") and message in printed


@pytest.mark.parametrize(("what", "name"), [("model", "owner/model"), ("data set", "ptb-text-only/ptb_text_only")])
def test_without_network(what, name, monkeypatch):
    """What the client raises after its retries."""

    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub") from httpx.ConnectError("Connection refused")

    monkeypatch.delenv(HUB_VARIABLE, raising=False)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SourceError) as found:
        load_model("owner/model") if what == "model" else load_texts("ptb", "held-out")
    assert str(found.value).startswith(f"cannot load the {what} '{name}': the hub cannot be reached: check the network")
    assert "SLIMLLM_NB_HUB" in str(found.value)
