"""What a run is asked to do: settings, presets, prompts."""
