"""What `foveate compare` draws if no file of prompts is given: single solid objects of all large groups."""

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
"""Labels that the bundled model was trained on, for models of texts."""

BUILT_IN_CLASSES = (
    "granny smith",
    "pineapple",
    "cheeseburger",
    "bagel",
    "killer whale",
    "loggerhead",
    "great grey owl",
    "zebra",
    "daisy",
    "lighthouse",
    "yawl",
    "fire engine",
    "soccer ball",
    "microphone",
    "bow tie",
    "backpack",
)
"""Classes of ImageNet, for models that draw those."""
