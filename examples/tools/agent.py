"""A receptionist with tools: looks things up, books, connects callers with a person, and hangs up."""

import logging
import os
from typing import Literal
from uuid import uuid4

import trio

from dialog_worker import Agent, CartesiaTTS, DeepgramSTT, Dtmf, Message, OpenAIAgent, RequestFailed, VoIP, tool

PERSON = "+15552003000"  # who takes over; [transfer] allow in the configuration has to have it too
NOBODY = "nobody can take your call at the moment"

Day = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]

log = logging.getLogger("agent")


class Restaurant:
    """What the tools ask. It is a table in memory, made anew for every call; yours is a database, and awaited likewise."""

    def __init__(self) -> None:
        self._menu = ["minestrone", "risotto with saffron", "sea bass with lemon", "tiramisu"]
        self._seats = {"18:00": 8, "19:30": 6, "20:00": 4, "21:30": 0}  # free ones, by the time

    async def hours(self, day: Day) -> str:
        """Return when it is open."""
        await trio.lowlevel.checkpoint()
        return "closed" if day == "monday" else "open from noon until ten in the evening"

    async def menu(self) -> list[str]:
        """Return today's dishes."""
        await trio.lowlevel.checkpoint()
        return self._menu

    async def free_seats(self, time: str) -> int:
        """Return how many seats are free at a time such as "19:30"."""
        await trio.lowlevel.checkpoint()
        return self._seats.get(time, 0)

    async def take_seats(self, time: str, people: int) -> bool:
        """Book seats, and return whether there were so many."""
        if await self.free_seats(time) < people:
            return False
        self._seats[time] -= people
        return True


class Receptionist(OpenAIAgent):
    """Answers the phone of a restaurant, with its books at hand."""

    system = (
        "You answer the phone at Bella's, an Italian restaurant. One or two short sentences. Look things up with your tools "
        "instead of guessing. When a tool's result begins with 'error:', apologise and say why."
    )
    greeting = "Bella's, good evening. How can I help?"
    restaurant: Restaurant

    async def run(self) -> None:
        """Serve the call, with the restaurant's books open."""
        self.restaurant = Restaurant()
        await super().run()

    @tool
    async def opening_hours(self, day: Day | None = None) -> str:
        """Look up when the restaurant is open, on one day or all week."""
        if day is not None:
            return f"on {day.capitalize()} we are {await self.restaurant.hours(day)}"
        return f"on Mondays we are {await self.restaurant.hours('monday')}, else {await self.restaurant.hours('tuesday')}"

    @tool
    async def todays_menu(self) -> str:
        """Look up what there is to eat today."""
        return f"today we have {', '.join(await self.restaurant.menu())}"

    @tool
    async def free_table(self, time: str, people: int = 2) -> str:
        """Look up whether a table is free. `time` is like "19:30"."""
        if await self.restaurant.free_seats(time) >= people:
            return f"yes, a table is free at {time}"
        return f"no, all tables are taken at {time}"

    @tool
    async def book_table(self, people: int, time: str) -> str:
        """Book a table. `time` is like "19:30"."""
        with self.uninterrupted():  # a caller who begins to speak now does not leave half a booking behind
            booked = await self.restaurant.take_seats(time, people)
        return f"booked: a table for {people} at {time}" if booked else f"error: there is no table for {people} at {time}"

    @tool
    async def transfer_to_person(self) -> str:
        """Connect the caller with a person, after saying so."""
        return "the caller is being connected" if await self.connect_person() else f"error: {NOBODY}"

    @tool
    async def hang_up(self) -> str:
        """End the call, after saying goodbye."""
        await self.hangup()
        return "the call is over"

    async def on_dtmf(self, dtmf: Dtmf) -> None:
        """Connect a caller who presses 0 with a person, whatever is being said."""
        if dtmf.digit != "0":
            return
        self.abort()
        if not await self.connect_person():
            await self.dispatch_message(Message(str(uuid4()), f"I am sorry, {NOBODY}.", done=True))

    async def connect_person(self) -> bool:
        """Hand the call over once all was said, and return whether that was possible."""
        try:
            await self.transfer_to(PERSON)
        except RequestFailed as error:  # the allow-list does not have the number, or the carrier refused
            log.warning("no transfer to %s: %s", PERSON, error)
            return False
        return True


def create(voip: VoIP) -> Agent:
    """Make the agent of one call."""
    return Receptionist(
        voip=voip,
        stt=DeepgramSTT(),
        tts=CartesiaTTS(voice=os.environ["CARTESIA_VOICE"]),
        model=os.environ["OPENAI_MODEL"],
    )
