"""What `foveate compare` draws if no file of prompts is given: single solid objects of all large groups.

All of them are labels that the bundled model was trained on.
"""

BUILT_IN_PROMPTS = (
    "green apple",
    "watermelon",
    "taco",
    "doughnut",
    "dolphin",
    "turtle",
    "owl",
    "zebra",
    "hibiscus",
    "evergreen tree",
    "sailboat",
    "fire engine",
    "soccer ball",
    "microphone",
    "top hat",
    "backpack",
)
