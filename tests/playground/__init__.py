"""The page at `/`, in a real headless Chromium against a real server process."""
