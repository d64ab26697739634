"""The app's side: what an app imports, and its process in a container."""
