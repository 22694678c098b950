"""A prompt's continuations: the requests they are made by, the ones that are returned, and the text of one as it grows."""

import dataclasses
import math
from collections.abc import Iterator

from jfp8kv.engine.request import PromptOutputs, Request, RequestOutput
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.sampling.rng import request_key
from jfp8kv.text.detokenizer import Detokenizer
from jfp8kv.text.prompts import Encoded
from jfp8kv.text.tokenizer import Tokenizer

CONTEXT = 4  # prompt tokens decoded before the first output token, so that a leading space survives


@dataclasses.dataclass
class RequestGroup:
    """A prompt and the requests made for it: `n`, or `best_of` to choose from. They share the pages of the prompt."""

    prompt: Encoded
    params: SamplingParams
    requests: list[Request]

    @classmethod
    def of(
        cls,
        prompt: Encoded,
        params: SamplingParams,
        *,
        room: int,
        tokenizer: Tokenizer | None,
        engine_seed: int,
        number: int,
    ) -> "RequestGroup":
        """Requests for a prompt that leaves `room` tokens; `number` tells those without a seed apart."""
        requests = [
            Request(
                prompt.ids,
                params,
                request_key(params.seed, index=index, engine_seed=engine_seed, number=number),
                max_tokens=min(params.max_tokens, room),
                index=index,
                detokenizer=tokenizer
                and Detokenizer(
                    tokenizer,
                    params.stop,
                    keep_stop=params.include_stop_str_in_output,
                    context=prompt.ids[-CONTEXT:],
                ),
            )
            for index in range(params.best_of or params.n)
        ]
        if params.prompt_logprobs is not None:
            first, *_ = requests
            first.prompt_outputs = PromptOutputs.logprobs(prompt.ids, top=params.prompt_logprobs)
        return cls(prompt, params, requests)

    def output(self) -> RequestOutput:
        """What the user gets, once all requests have ended."""
        first = self.requests[0]
        began = [r.first_token for r in self.requests if r.first_token is not None]
        ended = [r.finished for r in self.requests if r.finished is not None]
        return RequestOutput(
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.ids,
            outputs=[
                dataclasses.replace(r.output(), index=index)
                for index, r in enumerate(self._chosen())
            ],
            prompt_logprobs=first.prompt_outputs
            and first.prompt_outputs.top_logprobs(self.prompt.ids),
            first_token_s=min(began) - first.submitted if began else None,
            total_s=max(ended) - first.submitted if ended else None,
        )

    def _chosen(self) -> list[Request]:
        """The `n` to return: with `best_of` whole texts first, then the likeliest, best first, and of equals the earlier."""
        if self.params.best_of is None:
            return self.requests
        return sorted(self.requests, key=lambda r: (_whole(r), _mean_logprob(r)), reverse=True)[
            : self.params.n
        ]


def _whole(request: Request) -> bool:
    """Whether a text ends where it should: not in a dead end or at a deadline, nor by its length when it was to look like
    something."""
    return request.finish_reason == "stop" or (
        request.finish_reason == "length" and request.params.constraint is None
    )


def _mean_logprob(request: Request) -> float:
    made = request.output_logprobs
    return sum(made) / len(made) if made else -math.inf


class OutputStream:
    """The text of a request while it is made, piece by piece. `ended`: there is no more to come."""

    def __init__(self, request: Request):
        self.request, self.ended, self._sent = request, False, 0

    def has_update(self) -> bool:
        """Whether there is a piece, or nothing more to come."""
        return self.request.finish_reason is not None or len(self.request.text) > self._sent

    def deltas(self) -> Iterator[str]:
        """The text since the last piece, if there is any. Another thread may be making more just now."""
        self.ended = (
            self.request.finish_reason is not None
        )  # asked first: nothing is added to a text once this is set
        text = self.request.text
        piece, self._sent = text[self._sent :], len(text)
        if piece:
            yield piece
