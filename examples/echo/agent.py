"""An agent without ears or voice: every piece of audio goes straight back to the caller."""

from dialog_worker import Agent, Media, Message, VoIP


class Echo(Agent):
    """Says back whatever it hears."""

    def on_media(self, media: Media) -> None:
        """Post the audio back."""
        self.voip.post(Message("echo", media.payload))


def create(voip: VoIP) -> Agent:
    """Make the agent of one call."""
    return Echo(voip=voip)
