"""The echo agent on Pipecat, for comparison: every caller's audio goes straight back, all calls in this one process.

It answers the voice webhook at /twiml and takes Media Streams at /media, as Pipecat's own Twilio examples do. It checks no
signature, so it does less for a call than dialogd.
"""

import sys

import uvicorn
from fastapi import FastAPI, Response, WebSocket
from loguru import logger
from pipecat.frames.frames import Frame, InputAudioRawFrame, OutputAudioRawFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.serializers.twilio import TwilioFrameSerializer
from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams, FastAPIWebsocketTransport
from pipecat.workers.runner import WorkerRunner

RATE = 8000  # the telephone's, all the way, so that nothing is resampled


class Echo(FrameProcessor):
    """Makes audio that came in audio that goes out; everything else passes."""

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Send audio on as the bot's, as it is."""
        await super().process_frame(frame, direction)
        if isinstance(frame, InputAudioRawFrame):
            frame = OutputAudioRawFrame(frame.audio, frame.sample_rate, frame.num_channels)
        await self.push_frame(frame, direction)


async def talk(websocket: WebSocket) -> None:
    """Run the pipeline of one call until the carrier has gone."""
    await websocket.accept()
    await websocket.receive_json()  # `connected`
    start = (await websocket.receive_json())["start"]
    hang_up_by_carrier = TwilioFrameSerializer.InputParams(auto_hang_up=False)  # there is no REST API to hang up with
    serializer = TwilioFrameSerializer(start["streamSid"], params=hang_up_by_carrier)
    transport = FastAPIWebsocketTransport(
        websocket, FastAPIWebsocketParams(audio_in_enabled=True, audio_out_enabled=True, serializer=serializer)
    )
    worker = PipelineWorker(
        Pipeline([transport.input(), Echo(), transport.output()]),
        params=PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE),
    )

    @transport.event_handler("on_client_disconnected")
    async def leave(_transport: FastAPIWebsocketTransport, _websocket: WebSocket) -> None:
        await worker.cancel()

    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    await runner.run()


def serve(port: int) -> None:
    """Take calls at this port until killed."""
    app = FastAPI()

    @app.get("/healthz")
    async def ready() -> str:
        return "ready"

    @app.post("/twiml")
    async def answer() -> Response:
        twiml = f'<Response><Connect><Stream url="ws://127.0.0.1:{port}/media"/></Connect></Response>'
        return Response(twiml, media_type="text/xml")

    app.websocket("/media")(talk)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    logger.remove()  # a line of Pipecat's log for each frame would be measured as well
    logger.add(sys.stderr, level="ERROR")
    serve(int(sys.argv[1]))
