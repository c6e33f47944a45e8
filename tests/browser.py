"""Chromium of the tests that open a page, and the contrast of what it shows."""

from __future__ import annotations

import shutil

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
READABLE = 4.5  # contrast of text, WCAG 2 AA
# the contrast and the beginning of each visible text
CONTRASTS = """selectors => {
  const paint = (...colors) => {
    const context = new OffscreenCanvas(1, 1).getContext("2d");
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const light = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll(selectors)]
    .filter(e => e.textContent.trim() && e.checkVisibility()).map(element => {
      const grounds = [];
      for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
      const ground = paint(...grounds), text = paint(...grounds, getComputedStyle(element).color);
      const [a, b] = [light(ground), light(text)].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), `${element.tagName}.${element.className}: ${element.textContent.slice(0, 40)}`];
    });
}"""
