// What scrolls sideways can be scrolled with the keyboard too: tables, outputs and formulas that are wider than the page.
"use strict";
(() => {
  const boxes = ".bd-article :is(table, pre, .cell_output, .output, .pst-scrollable-table-container, div.math)";
  const reach = () => {
    for (const box of document.querySelectorAll(boxes)) {
      const scrolls = box.scrollWidth > box.clientWidth && ["auto", "scroll"].includes(getComputedStyle(box).overflowX);
      if (scrolls) box.tabIndex = 0;
    }
  };
  document.addEventListener("DOMContentLoaded", reach);
  window.addEventListener("load", reach);
  window.addEventListener("resize", reach);
})();
