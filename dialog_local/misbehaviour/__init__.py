"""Providers that fail on demand, so that an agent can be seen to get over it: a URL says how, or a control call does.

By URL, for the connections that it makes: `/misbehave/FAULT` before a provider's path, or `misbehave=FAULT` in its query:

    DEEPGRAM_URL=ws://127.0.0.1:8070/misbehave/drop=3/v1/listen
    OPENAI_BASE_URL=http://127.0.0.1:8070/misbehave/stall/v1
    CARTESIA_URL=ws://127.0.0.1:8070/tts/websocket?misbehave=close=1011,2,times=1

ElevenLabs's path may be left out (`ws://127.0.0.1:8070/misbehave/refuse=429`): its adapter takes a path for a whole one,
and its header tells whose it is. By control call, for what a provider serves from now on, connections that are already open
included; their seconds count from the call:

    POST /misbehave     {"provider": "deepgram", "what": "drop", "after_s": 0, "times": 1}
    GET /misbehave      the faults that were ordered, and how many times each is left
    DELETE /misbehave   ends all, on open connections too, and counts the URLs' `times` anew

The providers are `deepgram`, `openai-realtime`, `cartesia`, `elevenlabs` and `openai` (chat completions). The faults, with
the control call's name for each value; `N` are seconds, and decimals are fine:

    refuse[=STATUS]      status     answer the upgrade or the request with this HTTP status (503), in the provider's shape
    drop[=N]             after_s    N seconds (0) after it opened reset the TCP connection, without a close frame
    stall[=N]            after_s    after N seconds (0) read on, but send nothing any more; the connection stays open
    garbage[=N]          after_s    after N seconds (0) precede every message by one that cannot be read, by turns no JSON
                                    and JSON of wrong types; an answer that is one JSON body is garbage as a whole
    close=CODE[,N]       code,      after N seconds (1) close the WebSocket with this code, and what the provider says
                         after_s    with it; `reason=TEXT` says something else, such as NET-0001 or quota_exceeded
    slow=N               delay_s    wait N seconds before the first byte of each answer: an utterance's first result, a
                                    context's first audio, the model's first token

`times=K` ends each: only the next K connections (for chat completions: requests) misbehave; without it, all do. A connection
counts when it opens, and one that was open already when it is ordered to, the oldest first.
"""
