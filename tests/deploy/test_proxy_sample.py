"""docker/nginx.conf: what a stream needs of a proxy, and limits that agree with the server's."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from server.config import ServerConfig
from tests.debian_tools import tool
from tests.deploy.dockerfile_stages import ROOT

SAMPLE = (ROOT / "docker/nginx.conf").read_text()

SELF_SIGNED = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=llm.example.com".split()


def directive(name: str) -> str:
    """The value of a directive that stands once in the sample."""
    (found,) = re.findall(rf"^\s*{name}\s+([^;]+);", SAMPLE, re.MULTILINE)
    return str(found)


def default_of(setting: str) -> float:
    return float(ServerConfig.model_fields[setting].default)


def test_tokens_pass_through_at_once() -> None:
    assert directive("proxy_buffering") == "off"
    assert directive("gzip") == "off"
    assert directive("proxy_http_version") == "1.1"


def test_limits_agree_with_the_server() -> None:
    assert directive("client_max_body_size") == f"{default_of('max_body_bytes') / 2**20:.0f}m"
    assert directive("proxy_read_timeout") == f"{default_of('max_request_seconds'):.0f}s"
    kept = float(directive("keepalive_timeout").removesuffix("s"))
    assert kept < default_of("idle_seconds")  # or nginx would reuse what the server is closing


def test_only_the_api_is_public() -> None:
    assert re.findall(r"location (\S+) \{", SAMPLE) == ["/v1/", "/health/", "/"]
    assert re.search(r"location / \{\s*return 404;", SAMPLE)


def test_nginx_accepts_it(tmp_path: Path) -> None:
    key, chain = tmp_path / "privkey.pem", tmp_path / "fullchain.pem"
    subprocess.run(
        [*SELF_SIGNED, "-keyout", str(key), "-out", str(chain)],
        check=True,
        capture_output=True,
    )
    sample = SAMPLE.replace("/etc/ssl/llm.example.com", str(tmp_path))
    main = tmp_path / "nginx.conf"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in kinds)
    main.write_text(
        f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\naccess_log off;\n{paths}{sample}\n}}\n"
    )
    done = subprocess.run(
        [tool("nginx"), "-t", "-c", str(main), "-e", "stderr"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
