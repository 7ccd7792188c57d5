"""Figures of loss landscapes: a curve for a line, contours or a surface for a plane."""
