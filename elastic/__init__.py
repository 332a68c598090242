"""Elastic membership for training runs. Empty until the rendezvous lands."""
