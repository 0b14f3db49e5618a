"""Images over HTTP: what the model's own generate answers to the processor's inputs, and whatever is no image."""

import base64
import struct
import threading
import time
import zlib

import pytest

from swift.model.load import load_model
from swift.model.vision import load_processor
from tests.serve.conftest import is_error
from tests.vision import encoded, make_llava, make_qwen2_vl, picture

COUNT = 8
TEXT = "Is it snowing in Nanjing today?"
MAKERS = {"native": make_llava, "transformers": make_qwen2_vl}


@pytest.fixture(scope="module", params=MAKERS)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def folder(backend, tmp_path_factory):
    return MAKERS[backend](tmp_path_factory.mktemp("images") / "model")


@pytest.fixture(scope="module")
def server(start, folder, backend):
    options = ("--infer_backend", backend) if backend == "transformers" else ()
    return start(folder, "--served_model_name", "tiny", "--limit_mm_per_prompt", '{"image": 3}', *options).wait()


@pytest.fixture(scope="module")
def wanted(folder):
    """The text that generate finds for a message of texts and pictures."""
    loaded = load_model(folder, processor=load_processor(folder))

    def find(*parts):
        listed = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts]
        inputs = loaded.processor.apply_chat_template(
            [{"role": "user", "content": listed}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = loaded.model.generate(**inputs, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)[0]
        return loaded.tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return find


def url_of(raw, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def part_of(part, **fields):
    if isinstance(part, str) and not part.startswith(("data:", "http", "file", "/")):
        return {"type": "text", "text": part}
    url = part if isinstance(part, str) else url_of(encoded(part))
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def chat(*parts, **fields):
    message = {"role": "user", "content": [part_of(part) for part in parts]}
    return {"model": "tiny", "messages": [message], "max_tokens": COUNT, "min_tokens": COUNT, "temperature": 0, **fields}


def answer(server, *parts):
    status, body = server.post("/v1/chat/completions", chat(*parts))
    assert status == 200, body
    return body["choices"][0]["message"]["content"]


def png(width, height):
    """A PNG that says it has so many pixels, and holds a few."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


PROMPTS = [
    (picture(0), TEXT),
    (TEXT,),
    (TEXT, picture(1), "and", picture(2, (40, 72)), "beside?"),
    (picture(0), TEXT),
    (picture(3), TEXT),
]


def test_answers_are_those_of_generate_alone_and_together(server, wanted):
    texts = [wanted(*parts) for parts in PROMPTS]
    assert len(set(texts)) >= 3
    assert [answer(server, *parts) for parts in PROMPTS] == texts
    found = {}

    def ask(number):
        found[number] = answer(server, *PROMPTS[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(PROMPTS))] == texts


def test_openais_client_sends_an_image(server, wanted):
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    content = [{"type": "image_url", "image_url": {"url": url_of(encoded(picture(4))), "detail": "auto"}}, {"type": "text", "text": TEXT}]
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        max_tokens=COUNT,
        temperature=0,
        stream=True,
        extra_body={"min_tokens": COUNT},
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == wanted(picture(4), TEXT)


def test_the_newer_form_and_counting_tokens_read_images_too(server, folder):
    content = [{"type": "input_image", "image_url": url_of(encoded(picture(0)))}, {"type": "input_text", "text": TEXT}]
    body = {"model": "tiny", "input": [{"role": "user", "content": content}], "max_output_tokens": 2}
    status, response = server.post("/v1/responses", body)
    assert status == 200, response
    processor = load_processor(folder)
    listed = [{"type": "image", "image": picture(0)}, {"type": "text", "text": TEXT}]
    ids = processor.apply_chat_template(
        [{"role": "user", "content": listed}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"][0].tolist()
    assert response["usage"]["input_tokens"] == len(ids)
    status, counted = server.post("/tokenize", {"messages": chat(picture(0), TEXT)["messages"]})
    assert (status, counted["tokens"]) == (200, ids)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_other_formats_are_what_pillow_reads(server, wanted, kind):
    import io

    from PIL import Image

    raw = encoded(picture(5), kind)
    assert answer(server, url_of(raw, f"image/{kind.lower()}"), TEXT) == wanted(Image.open(io.BytesIO(raw)).convert("RGB"), TEXT)


def test_low_detail_is_an_image_of_at_most_512_pixels_each_way(server, wanted):
    large = picture(6, (1024, 256))
    small = large.copy()
    small.thumbnail((512, 512))
    assert small.size == (512, 128)
    message = {"role": "user", "content": [part_of(large, detail="low"), part_of(TEXT)]}
    status, body = server.post("/v1/chat/completions", {**chat(TEXT), "messages": [message]})
    assert status == 200
    assert body["choices"][0]["message"]["content"] == wanted(small, TEXT)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,$$$", "base64"),
        (url_of(b"no image at all"), "no PNG, JPEG, WebP or GIF"),
        (url_of(encoded(picture(0))[:-300]), "damaged"),
        (url_of(png(20_000, 20_000)), "pixels"),
        (url_of(png(9_000, 9_000)), "9000 x 9000 pixels"),
        (url_of(b"<svg/>", "image/svg+xml"), "not image/svg+xml"),
        ("data:image/png,abc", "data:image/png;base64"),
        ("http://127.0.0.1:1/snow.png", "http:, which is not fetched"),
        ("https://example.org/snow.png", "https:, which is not fetched"),
        ("file:///etc/hostname", "file:, which is not fetched"),
        ("/etc/hostname", "no URL"),
    ],
)
def test_what_is_no_image_is_refused_with_its_place(server, url, message):
    status, body = server.post("/v1/chat/completions", chat(TEXT, url))
    assert status == 400 and is_error(body)
    assert body["error"]["param"] == "messages[0].content[1].image_url"
    assert message in body["error"]["message"]


def test_an_animated_image_is_refused(server):
    import io

    file = io.BytesIO()
    picture(0).save(file, "GIF", save_all=True, append_images=[picture(1)])
    status, body = server.post("/v1/chat/completions", chat(url_of(file.getvalue(), "image/gif")))
    assert status == 400 and "animated" in body["error"]["message"]


def test_more_images_than_may_be_are_refused_at_the_first_that_is_too_many(server):
    status, body = server.post("/v1/chat/completions", chat(*[picture(0)] * 4, TEXT))
    assert status == 400
    assert body["error"]["message"] == "there are 4 images in the request, 3 at most"
    assert body["error"]["param"] == "messages[0].content[3].image_url"


def test_the_name_of_the_image_token_in_a_text_is_refused_beside_an_image(server, folder):
    token = load_processor(folder).image_token
    status, body = server.post("/v1/chat/completions", chat(picture(0), f"what is {token}?"))
    assert status == 400 and "2 times for 1 images" in body["error"]["message"]


def test_others_are_answered_while_a_large_image_is_read(server):
    large = url_of(encoded(picture(7, (64, 64)).resize((4000, 3000)), "JPEG"), "image/jpeg")
    done = []
    thread = threading.Thread(target=lambda: done.append(server.post("/tokenize", {"messages": chat(large, TEXT)["messages"]})))
    begin = time.monotonic()
    thread.start()
    slowest = 0.0
    while thread.is_alive():
        before = time.monotonic()
        assert server.get("/health")[0] == 200
        slowest = max(slowest, time.monotonic() - before)
    assert done[0][0] == 200
    assert slowest < max(0.1, 0.8 * (time.monotonic() - begin))
