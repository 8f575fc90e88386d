"""Official clients get what they ask for: openai with every parameter, LiteLLM and LangChain."""

import asyncio
import os
import struct

import openai
import pytest

from coterie.mixture import Mixture
from served import QUESTION, chat

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch a list of prices

ASKED = [{"role": "user", "content": QUESTION}]
EVERYTHING = {
    "model": "elrea",
    "messages": [{"role": "developer", "content": "Be kind.", "name": "x"}, *ASKED],
    "frequency_penalty": 0.5,
    "logit_bias": {"65": 1},
    "logprobs": True,
    "max_completion_tokens": 6,
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "n": 2,
    "parallel_tool_calls": True,
    "presence_penalty": -0.5,
    "prompt_cache_key": "k",
    "reasoning_effort": "low",
    "response_format": {"type": "text"},
    "safety_identifier": "u",
    "seed": 11,
    "service_tier": "auto",
    "stop": ["zzzz"],
    "store": False,
    "temperature": 0.8,
    "tool_choice": "auto",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "top_logprobs": 2,
    "top_p": 0.9,
    "user": "me",
    "verbosity": "low",
    "extra_body": {"top_k": 50, "min_p": 0.01, "coterie": {"detail": True, "top_k": 2}},
}
"""Every parameter of a chat that openai's client has and this server can honour or pass over."""


@pytest.fixture(scope="module")
def asking(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def text_of(answer):
    return [choice.message.content for choice in answer.choices]


def test_openai_sends_every_parameter_and_gets_the_same_whole_and_streamed(asking):
    whole = asking.chat.completions.create(**EVERYTHING)
    assert len(set(text_of(whole))) == 2 and whole.usage.completion_tokens <= 12
    texts, seen = ["", ""], []
    for chunk in asking.chat.completions.create(**EVERYTHING, stream=True, stream_options={"include_usage": True}):
        seen.append(chunk)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == text_of(whole) and seen[-1].usage.completion_tokens == whole.usage.completion_tokens
    detail = whole.choices[0].model_extra["coterie"]["weights"]
    assert sum(detail.values()) == pytest.approx(1) and len(detail) <= 2
    assert seen[0].choices[0].model_extra["coterie"]["weights"] == detail


def test_openai_asks_concurrently_and_each_gets_its_own(server, client):
    prompts = [f"add {number} 5" for number in range(6)]
    alone = [
        chat(client, messages=[{"role": "user", "content": one}], temperature=0)["choices"][0]["message"]["content"]
        for one in prompts
    ]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:

            async def one(prompt):
                asked = {"model": "elrea", "messages": [{"role": "user", "content": prompt}]}
                stream = await made.chat.completions.create(**asked, max_tokens=8, temperature=0, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(ask_all()) == alone


def test_openai_completes_texts_and_tokens(asking, mixture: Mixture):
    ids = mixture.tokenizer("add")["input_ids"]
    asked = {
        "model": "elrea",
        "max_tokens": 3,
        "temperature": 0,
        "logprobs": 2,
        "echo": True,
        "best_of": 1,
        "user": "u",
    }
    text, tokens = (asking.completions.create(prompt=prompt, **asked).choices[0] for prompt in ("add", ids))
    assert text.text == tokens.text and text.text.startswith("add")
    assert text.logprobs.tokens[:3] == ["a", "d", "d"] and text.logprobs.token_logprobs[0] is None
    several = asking.completions.create(prompt=["add", "add"], **{**asked, "logprobs": None, "suffix": None})
    assert [choice.text for choice in several.choices] == [text.text] * 2


def test_openai_lists_models_and_embeds(asking, mixture: Mixture):
    names = [model.id for model in asking.models.list()]
    assert "elrea" in names and asking.models.retrieve("elrea").id == "elrea"
    vectors = asking.embeddings.create(model="elrea", input=[QUESTION, "b"]).data  # asks for base64 by itself
    plain = asking.embeddings.create(model="elrea", input=QUESTION, encoding_format="float").data[0].embedding
    assert vectors[0].embedding == pytest.approx(plain, abs=1e-5) and len(vectors) == 2
    assert struct.pack("<f", plain[0])


def test_openai_raises_the_errors_that_it_has_for_them(asking):
    with pytest.raises(openai.NotFoundError) as unknown:
        asking.chat.completions.create(model="gpt-9", messages=ASKED)
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        asking.chat.completions.create(model="elrea", messages=ASKED, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="n: "):
        asking.chat.completions.create(model="elrea", messages=ASKED, n=10**6)


@pytest.mark.filterwarnings("ignore")
def test_litellm_asks_whole_and_streamed(server, client):
    import litellm

    asked = {"model": "openai/elrea", "api_base": f"{server.url}/v1", "api_key": "none", "messages": ASKED}
    wanted = chat(client, temperature=0)["choices"][0]["message"]["content"]
    whole = litellm.completion(**asked, max_tokens=8, temperature=0, logprobs=True, top_logprobs=1)
    assert whole.choices[0].message.content == wanted and whole.usage.completion_tokens == 8
    chunks = list(litellm.completion(**asked, max_tokens=8, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted


@pytest.mark.filterwarnings("ignore")
def test_langchain_asks_whole_streamed_and_embeds(server, client):
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    to = {"base_url": f"{server.url}/v1", "api_key": "none", "model": "elrea"}
    wanted = chat(client, temperature=0)["choices"][0]["message"]["content"]
    model = ChatOpenAI(**to, max_tokens=8, temperature=0)
    answer = model.invoke(QUESTION)
    assert answer.content == wanted and answer.usage_metadata["output_tokens"] == 8
    assert "".join(str(piece.content) for piece in model.stream(QUESTION)) == wanted
    assert len(OpenAI(**to, max_tokens=3, temperature=0).invoke("add")) > 0
    embedded = OpenAIEmbeddings(**to, check_embedding_ctx_length=False).embed_documents(["a", "b"])
    assert len(embedded) == 2
