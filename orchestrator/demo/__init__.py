"""`orchestrator demo`: draws synthetic scenes (`scenes`), pretrains on them and shows what was learned (`run`)."""
