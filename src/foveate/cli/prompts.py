"""What `foveate compare` draws if no file of prompts is given: single solid objects, one of each large group."""

BUILT_IN_PROMPTS = (
    "red apple",
    "banana",
    "strawberry",
    "slice of pizza",
    "cup of coffee",
    "birthday cake",
    "dolphin",
    "turtle",
    "butterfly",
    "sunflower",
    "rocket",
    "sailboat",
    "fire engine",
    "soccer ball",
    "guitar",
    "umbrella",
)
