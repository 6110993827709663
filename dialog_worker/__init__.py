"""What runs inside a call's worker, and what an agent's author imports.

Names are loaded when they are first asked for: an agent without a language model does not pay for one in memory.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dialog_worker.agent.base import Agent
    from dialog_worker.agent.openai import OpenAIAgent
    from dialog_worker.agent.tools import tool
    from dialog_worker.agent.twilio_openai import CompletedCall, TwilioVoIPOpenAIAgent
    from dialog_worker.participant import ProviderError, Word
    from dialog_worker.stt.base import STT
    from dialog_worker.stt.deepgram import DeepgramSTT
    from dialog_worker.stt.openai import OpenAISTT
    from dialog_worker.tts.base import TTS
    from dialog_worker.tts.cartesia import CartesiaTTS
    from dialog_worker.tts.elevenlabs import ElevenLabsTTS
    from dialog_worker.voip import RequestFailed, VoIP
    from protocol.messages import (
        CallStatus,
        Dtmf,
        Error,
        Media,
        Message,
        MessageDispatched,
        Metadata,
        RecordingStatus,
        RecordingUrl,
        Shutdown,
        StreamingStarted,
        StreamingStopped,
        StreamStatus,
        TimeLimit,
        Transcript,
        TranscriptStatus,
    )

_HOMES = {
    "Agent": "dialog_worker.agent.base",
    "CallStatus": "protocol.messages",
    "CartesiaTTS": "dialog_worker.tts.cartesia",
    "CompletedCall": "dialog_worker.agent.twilio_openai",
    "DeepgramSTT": "dialog_worker.stt.deepgram",
    "Dtmf": "protocol.messages",
    "ElevenLabsTTS": "dialog_worker.tts.elevenlabs",
    "Error": "protocol.messages",
    "Media": "protocol.messages",
    "Message": "protocol.messages",
    "MessageDispatched": "protocol.messages",
    "Metadata": "protocol.messages",
    "OpenAIAgent": "dialog_worker.agent.openai",
    "OpenAISTT": "dialog_worker.stt.openai",
    "ProviderError": "dialog_worker.participant",
    "RecordingStatus": "protocol.messages",
    "RecordingUrl": "protocol.messages",
    "RequestFailed": "dialog_worker.voip",
    "STT": "dialog_worker.stt.base",
    "Shutdown": "protocol.messages",
    "StreamStatus": "protocol.messages",
    "StreamingStarted": "protocol.messages",
    "StreamingStopped": "protocol.messages",
    "TTS": "dialog_worker.tts.base",
    "TimeLimit": "protocol.messages",
    "Transcript": "protocol.messages",
    "TranscriptStatus": "protocol.messages",
    "TwilioVoIPOpenAIAgent": "dialog_worker.agent.twilio_openai",
    "VoIP": "dialog_worker.voip",
    "Word": "dialog_worker.participant",
    "tool": "dialog_worker.agent.tools",
}

__all__ = [
    "STT",
    "TTS",
    "Agent",
    "CallStatus",
    "CartesiaTTS",
    "CompletedCall",
    "DeepgramSTT",
    "Dtmf",
    "ElevenLabsTTS",
    "Error",
    "Media",
    "Message",
    "MessageDispatched",
    "Metadata",
    "OpenAIAgent",
    "OpenAISTT",
    "ProviderError",
    "RecordingStatus",
    "RecordingUrl",
    "RequestFailed",
    "Shutdown",
    "StreamStatus",
    "StreamingStarted",
    "StreamingStopped",
    "TimeLimit",
    "Transcript",
    "TranscriptStatus",
    "TwilioVoIPOpenAIAgent",
    "VoIP",
    "Word",
    "tool",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dialog_worker' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
