"""Geometry: do units that fire together lie together, and does the cloud of directions have structure?"""
