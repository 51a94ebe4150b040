"""Adaptive parallel reasoning: models that fork their thinking into threads and join it again.

`generate` runs a Hugging Face model under a protocol and returns a `Trace`; `stream` gives the same
event by event; `CustomGenerate` is for `model.generate(custom_generate=...)`.
"""

from __future__ import annotations

from fork_attn.reason import systems
from fork_attn.reason.custom_generate import CustomGenerate
from fork_attn.reason.generate import generate, stream
from fork_attn.reason.job import Finished, StreamEvent, ThreadEvent, TokenEvent
from fork_attn.reason.limits import Limits
from fork_attn.reason.protocol import Protocol, get_protocol, protocols, register
from fork_attn.reason.script import Ended, Script, together
from fork_attn.reason.speculation import DraftModel, PromptLookup, Speculation
from fork_attn.reason.tags import add_tags
from fork_attn.reason.thread import Thread
from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_records import (
    Event,
    Injection,
    Span,
    StepRecord,
    ThreadRecord,
    Watching,
)

__all__ = [
    "CustomGenerate",
    "DraftModel",
    "Ended",
    "Event",
    "Finished",
    "Injection",
    "Limits",
    "PromptLookup",
    "Protocol",
    "Script",
    "Span",
    "Speculation",
    "StepRecord",
    "StreamEvent",
    "Thread",
    "ThreadEvent",
    "ThreadRecord",
    "TokenEvent",
    "Trace",
    "Watching",
    "add_tags",
    "generate",
    "get_protocol",
    "protocols",
    "register",
    "stream",
    "systems",
    "together",
]
