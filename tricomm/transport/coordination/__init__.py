"""How ranks agree on what they do and find out who failed, over their group's store; no tensor passes here.

Imports: errors. ``rendezvous`` compares calls before they begin, ``monitor`` keeps their deadlines while they run.
"""
