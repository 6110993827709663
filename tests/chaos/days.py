"""What is talked about: seven questions that a recogniser tells apart, and the answers that are right."""

HOURS = {
    "monday": "On Monday from nine to twelve.",
    "tuesday": "On Tuesday from ten to seven.",
    "wednesday": "On Wednesday from eight to eleven.",
    "thursday": "On Thursday from seven to nine.",
    "friday": "On Friday from twelve to eight.",
    "saturday": "On Saturday from eleven to ten.",
    "sunday": "On Sunday we are closed all day.",
}
DAYS = tuple(HOURS)
GREETING = "Good morning."


def question(day: str) -> str:
    """Return what the caller says."""
    return f"When are you open on {day.capitalize()}?"


def answer(day: str) -> str:
    """Return what the agent has to say to that, as the scripted brain words it."""
    return f"{HOURS[day]} Anything else?"
