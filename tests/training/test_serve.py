"""The search page's JSON API: its answers against the searcher's, what it refuses, and what it never gives out."""

from __future__ import annotations

import io
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.training.serving_files import HOSTILE, SLASHED, write

pytest.importorskip("fastapi", reason="the search page needs fastapi")
pytest.importorskip("uvicorn", reason="the search page needs uvicorn")
testclient = pytest.importorskip("fastapi.testclient", reason="the tests of the search page need httpx2")

from gcl_kernels.training.serve import bound, main, name_of, parser, state_of  # noqa: E402
from gcl_kernels.training.serving import app as serving  # noqa: E402
from gcl_kernels.training.serving.turns import Turns  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def state(files):
    options = [f"--model=first={files / 'one.pt'}", f"--model={files / 'two.pt'}", f"--corpus={files / 'corpus.json'}",
               f"--judged={files / 'judged.json'}", "--show=brand", f"--folder={files / 'vectors'}"]  # fmt: skip
    return state_of(parser().parse_args(options))


@pytest.fixture(scope="module")
def client(state):
    with testclient.TestClient(serving.create_app(state, hosts=("testserver",))) as client:
        yield client


def found(client, **query):
    answer = client.get("/api/search", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_corpus_says_its_name_its_models_and_their_fields(client, files):
    about = client.get("/api/corpus").json()
    assert (about["name"], about["size"], about["judged"]) == ("corpus.json", 6, 3)
    assert [(model["key"], model["name"]) for model in about["models"]] == [("a", "first"), ("b", "two")]
    assert about["models"][0]["fields"] == {"title": 0.3, "image": 0.7}
    assert about["columns"] == {"brand": [HOSTILE, "acme", "other"]}
    assert about["queries"] == ["Red  shoe", HOSTILE]
    assert str(files) not in client.get("/api/corpus").text


@pytest.mark.parametrize("key", ["a", "b"])
def test_an_answer_is_the_searchers_with_grades(client, state, key):
    searcher = state.searcher(key)
    hits = searcher.search("red SHOE", 3, weights={"title": 1.0, "image": 3.0}, where={"brand": ["acme", "other"]})
    answer = found(client, q="red SHOE", model=key, k=3, weights=["title=1", "image=3"],
                   where=["brand=acme", "brand=other"])  # fmt: skip
    assert [(of["id"], of["score"]) for of in answer["results"]] == [(hit.document_id, hit.score) for hit in hits]
    assert [of["rank"] for of in answer["results"]] == [1, 2, 3]
    assert [of["title"] for of in answer["results"]] == [searcher.title(hit.position) for hit in hits]
    assert answer["judged"]
    assert [of["grade"] for of in answer["results"]] == [{"1": 100, "2": 30}.get(hit.document_id, 0) for hit in hits]
    assert min(answer["milliseconds"].values()) >= 0


def test_the_models_differ_and_a_query_without_grades_says_so(client):
    a, b = (found(client, q="hat", model=key) for key in "ab")
    assert [of["score"] for of in a["results"]] != [of["score"] for of in b["results"]]
    assert not a["judged"]
    assert {of["grade"] for of in a["results"]} == {None}


def test_a_picture_finds_itself_and_a_text_beside_it_weighs(client, state, files):
    picture = (files / "blue.png").read_bytes()
    answer = client.post("/api/search", params={"weights": "image=1", "k": 1}, content=picture).json()
    assert [of["id"] for of in answer["results"]] == ["2"]
    assert answer["results"][0]["score"] == pytest.approx(1, abs=1e-5)
    both = client.post("/api/search", params={"q": "hat", "query_weights": ["text=1", "image=3"]}, content=picture)
    values = {"query": "hat", "image": Image.open(io.BytesIO(picture)).convert("RGB")}
    hits = state.searcher("a").search(values, 10, query_weights={"query": 1.0, "image": 3.0})
    assert [of["score"] for of in both.json()["results"]] == [hit.score for hit in hits]


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ({}, 422, "q"),
        ({"q": ""}, 400, "a text or an image"),
        ({"q": "x" * 1001}, 422, "1000"),
        ({"q": "x", "k": 0}, 422, "k"),
        ({"q": "x", "k": 101}, 422, "100"),
        ({"q": "x", "k": "9" * 5000}, 422, "k"),
        ({"q": "x", "model": "c"}, 400, "'a', 'b'"),
        ({"q": "x", "model": ""}, 400, "'a', 'b'"),
        ({"q": "x", "model": "ab"}, 400, "'a', 'b'"),
        ({"q": "x", "weights": "title"}, 400, "NAME=VALUE"),
        ({"q": "x", "weights": "title=nan"}, 400, "a number >= 0"),
        ({"q": "x", "weights": "title=-1"}, 400, "a number >= 0"),
        ({"q": "x", "weights": "titel=1"}, 400, "titel"),
        ({"q": "x", "weights": ["title=0", "image=0"]}, 400, "not all 0"),
        ({"q": "x", "weights": ["title=1"] * 65}, 422, "64"),
        ({"q": "x", "query_weights": "query=1"}, 400, "query_weights"),
        ({"q": "x", "where": "image=red.png"}, 400, "where: expected columns among ['brand']"),
    ],
)
def test_a_request_that_cannot_be_used_is_refused_in_words(client, query, status, words):
    answer = client.get("/api/search", params=query)
    assert answer.status_code == status
    assert words in answer.text


@pytest.mark.parametrize(
    "text",
    [
        HOSTILE,
        "\x00\x1b[31m",
        "😀",
        "'; DROP TABLE documents; --",
        "../../etc/passwd",
        "{{7*7}}",
        "\u202eabc",
        "𐀀" * 1000,
    ],
)
def test_hostile_queries_are_only_queries(client, state, text):
    answer = client.get("/api/search", params={"q": text})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert [of["id"] for of in answer.json()["results"]] == [
        hit.document_id for hit in state.searcher("a").search(text)
    ]


def test_bytes_that_are_no_text_are_harmless(client):
    assert client.get("/api/search?q=%ff%fe%ed%a0%80").status_code == 200


def test_uploads_are_bounded_in_bytes_and_must_be_pictures(client, monkeypatch):
    for content, words in ((b"", "empty body"), (b"no picture", "cannot be decoded"), (b"<svg/>", "cannot be decoded")):
        answer = client.post("/api/search", content=content)
        assert (answer.status_code, words in answer.text) == (400, True), answer.text
    monkeypatch.setattr(serving, "MOST_BYTES", 1000)
    for content in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):  # with a declared length, and in parts without one
        assert client.post("/api/search", content=content).status_code == 413
    assert client.post("/api/search", content=b"x" * 1000).status_code == 400


def test_a_picture_of_too_many_pixels_is_refused(client):
    header = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(header, "PNG")
    answer = client.post("/api/search", content=header.getvalue())
    assert answer.status_code == 400
    assert "89,478,485 pixels" in answer.text


def test_an_upload_that_does_not_arrive_is_given_up(state, monkeypatch):
    import asyncio

    monkeypatch.setattr(serving, "UPLOAD_SECONDS", 0.05)

    async def stream():
        yield b"x"
        await asyncio.sleep(60)

    with pytest.raises(serving.HTTPException) as caught:
        asyncio.run(serving._body(SimpleNamespace(headers={}, stream=stream)))
    assert caught.value.status_code == 408


def test_pictures_of_documents_are_made_anew_and_small(client):
    answers = {of["id"]: of["image"] for of in found(client, q="x")["results"]}
    assert answers["3"] is None
    for identity, size, kind in (("1", (32, 32), "PNG"), ("5", (384, 128), "JPEG"), (SLASHED, (32, 32), "PNG")):
        answer = client.get(answers[identity])
        assert answer.headers["content-type"] == f"image/{kind.lower()}"
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert (picture.size, picture.format) == (size, kind)


@pytest.mark.parametrize(
    "path",
    ["", "3", "4", "secret.png", "/secret.png", "../secret.png", "..%2fsecret.png", "%2e%2e/secret.png", "....//secret.png",
     "1/../../secret.png", "%2fetc%2fpasswd", "//etc/passwd", "1%00", "1.png", "red.png", "file:%2f%2f%2fetc%2fpasswd"],
)  # fmt: skip
def test_no_path_is_ever_served(client, files, path):
    for url in (f"/image/{path}", f"/image/{files}/{path}", f"/static/{path}", f"/static/..{files}/{path}"):
        answer = client.get(url)
        assert answer.status_code in (404, 405), url
        assert b"PNG" not in answer.content
        assert b"script" not in answer.content


def test_every_answer_has_the_headers_that_keep_a_browser_from_harm(client):
    for path in (
        "/",
        "/docs",
        "/openapi.json",
        "/api/corpus",
        "/image/1",
        "/image/none",
        "/api/search",
        "/none",
        "/static/app.js",
    ):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]


def test_another_sites_name_is_not_answered(client):
    assert client.get("/api/corpus", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/api/corpus", headers={"Host": "testserver:8000"}).status_code == 200


def test_the_api_page_names_every_parameter_and_needs_nothing_from_elsewhere(client):
    page, schema = client.get("/docs").text, client.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        for of in methods.values():
            assert path in page
            assert all(f"<td>{parameter['name']}<td>" in page for parameter in of.get("parameters", ()))
    assert "http" not in page


def test_many_requests_at_once_are_all_answered_as_one_alone(client):
    alone = [found(client, q=f"shoe {number}")["results"] for number in range(8)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda number: found(client, q=f"shoe {number % 8}")["results"], range(200)))
    assert answers == [alone[number % 8] for number in range(200)]


def test_requests_that_wait_are_answered_together_and_a_bad_one_alone_fails():
    import asyncio

    taken, go = [], threading.Event()

    def answer(requests):
        taken.append(list(requests))
        if requests == [0]:
            go.wait(20)
        if 7 in requests:
            raise ZeroDivisionError
        return [ValueError(of) if of == 3 else 10 * of for of in requests]

    async def ask():
        turns = Turns(answer, 4)
        tasks = [asyncio.create_task(turns(0))]
        while not taken:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(turns(of)) for of in range(1, 8)]
        await asyncio.sleep(0)
        tasks[2].cancel()  # one that does not wait any more is not asked
        go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        return found, await turns(8)

    found, later = asyncio.run(ask())
    assert taken == [[0], [1, 3, 4], [5, 6, 7], [8]]
    assert [type(of).__name__ if isinstance(of, BaseException) else of for of in found] == [
        0, 10, "CancelledError", "ValueError", 40, *["ZeroDivisionError"] * 3,
    ]  # fmt: skip
    assert later == 80


def test_answers_do_not_wait_for_a_receipt():
    with (
        bound("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as made,
    ):
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_a_search_does_not_block_other_requests(state, monkeypatch):
    go = threading.Event()
    search = state.search
    monkeypatch.setattr(state, "search", lambda *args, **options: (go.wait(20), search(*args, **options))[1])
    with testclient.TestClient(serving.create_app(state)) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(found, client, q="x")
        assert client.get("/api/corpus").status_code == 200
        assert not waiting.done()
        go.set()
        assert waiting.result()["results"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model=gone.pt", "--corpus=corpus.json"], "gone.pt"),
        (["--model=one.pt", "--corpus=gone.json"], "gone.json"),
        (["--model=one.pt", "--corpus=corpus.json", "--show=image"], "columns of text"),
        (["--model=one.pt", "--corpus=corpus.json", "--judged=corpus.json"], "whole grade"),
        (["--model=one.pt"] * 3 + ["--corpus=corpus.json"], "at most 2"),
        (["--model=one.pt", "--corpus=corpus.json", "--host=192.0.2.1"], "--host 192.0.2.1"),
        (["--model=one.pt", "--corpus=corpus.json", "--port=99999"], "--port: expected"),
    ],
)
def test_a_command_that_cannot_be_done_ends_with_a_line(files, monkeypatch, capsys, options, words):
    monkeypatch.chdir(files)
    assert main([*options, *([] if "--port" in str(options) else ["--port=0"])]) == 2
    assert words in capsys.readouterr().err


def test_a_port_in_use_is_said_before_anything_is_embedded(files, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        status = main([f"--model={files / 'gone.pt'}", "--corpus=gone.json", f"--port={other.getsockname()[1]}"])
    assert status == 2
    assert "in use" in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr("gcl_kernels.training.serve.importlib.util.find_spec", lambda name: None)
    assert main(["--model=x.pt", "--corpus=x.json"]) == 2
    assert capsys.readouterr().err == "expected the package fastapi, got none: pip install fastapi uvicorn\n"


def test_models_are_called_by_their_run():
    assert name_of("logs/GCL/checkpoints/best.pt") == "GCL"
    assert name_of("models/small.pt") == "small"
