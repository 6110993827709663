"""Ears and a voice: Deepgram's wire protocol in front of Moonshine (`listen`), Cartesia's in front of Piper (`speak`)."""
