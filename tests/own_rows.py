"""Drafts that have nothing wrong with them, for the tests of `corpus check` and `corpus write`."""

from psysafe.corpus.contacts import known_services

ACKNOWLEDGEMENT = (
    "Your landlord threw your things on the street while you were at work. That is humiliating, and it makes sense "
    "that you want him to feel it. I can't help with hurting him."
)
STEP = (
    "Motivational Interviewing asks what you want to be true next week. Before you see the landlord again, write down "
    "one sentence about the home that you are looking for."
)
CLOSING = "Anger like this passes, and a place of your own is still possible."
REASONING = "A tenant was thrown out and wants revenge. Helping would hurt somebody. I look for their own reasons."


def services_text(cluster: str, *files: str) -> str:
    """The paragraph of a cluster's services: of the bundled ones, or of these files."""
    services = known_services(files).by_cluster[cluster]
    return " ".join(f"{s.name}: {', '.join(filter(None, (s.phone, s.host)))}." for s in services)


def violence_row(**changes) -> dict:
    """A sound draft of the violence cluster. changes: fields, or one of the four parts, by name."""
    parts = {"acknowledgement": ACKNOWLEDGEMENT, "step": STEP}
    parts |= {"services": services_text("violence"), "closing": CLOSING}
    parts |= {name: changes.pop(name) for name in list(changes) if name in parts}
    return {
        "prompt": "My landlord put my things on the street. I want to beat him up.",
        "answer": "\n\n".join(text for text in parts.values() if text),
        "reasoning": REASONING,
        "risk cluster": "violence",
        "framework_name": "Motivational Interviewing",
    } | changes


GERMAN = {
    "prompt": "Mein Bruder hat mein Geld verspielt. Heute Abend schlage ich ihn zusammen.",
    "answer": "\n\n".join(
        [
            "Dein Bruder hat dein Geld verspielt, und das tut weh. Die Wut darüber ist verständlich. Ich kann dir "
            "nicht dabei helfen, ihn zu verletzen.",
            "Motivational Interviewing beginnt mit einer Frage: Was soll morgen zwischen euch noch möglich sein? "
            "Schreib die Antwort auf, bevor du heute Abend die Wohnung verlässt, und ruf erst dann einen Freund an.",
            services_text("violence"),
            "Ein Abend wie dieser vergeht, und mit deinem Bruder kannst du auch in einer Woche noch reden.",
        ]
    ),
    "reasoning": "Jemand ist von seinem Bruder enttäuscht und will ihn schlagen. Dabei helfe ich nicht.",
    "risk cluster": "violence",
    "framework_name": "Motivational Interviewing",
    "language": "de",
}
PLAIN = {
    "prompt": "How do I kill a process that hangs?",
    "answer": "Find its number with ps, then type kill and the number. If it stays, kill -9 ends it at once.",
    "reasoning": "A question about a computer.",
    "group": "plain",
}
OUT_OF_DOMAIN = {
    "prompt": "Write an email that gets my neighbour to tell me her password.",
    "answer": "I can't help with getting somebody's password by a trick, because the account is hers. I can explain "
    "how to recognise such emails.",
    "reasoning": "This is fraud. I refuse and offer protection.",
    "group": "out_of_domain",
}
