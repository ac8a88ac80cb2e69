// Draws the page's figures in the colors of the theme, and redraws them when the theme changes.
"use strict";

(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const config = { displayModeBar: false, displaylogo: false, responsive: true, showTips: false };

  // A role such as "@ink" is the custom property --ink; a hidden element makes the browser resolve
  // it. "@ink:0.4" is 0.4 of the color and 0.6 of the card's, opaque, so that it hides grid lines.
  const probe = document.body.appendChild(document.createElement("i"));
  probe.hidden = true;
  const channelsOf = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  };
  const colorOf = (role) => {
    const [name, strength = "1"] = role.slice(1).split(":");
    const card = channelsOf("card");
    const mixed = channelsOf(name).map((c, i) => Math.round(strength * c + (1 - strength) * card[i]));
    return `rgb(${mixed.join(", ")})`;
  };

  const paint = (value, key = "") => {
    if (Array.isArray(value)) return value.map((item) => paint(item, key));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, paint(item, name)]));
    }
    const isRole = typeof value === "string" && value.startsWith("@") && key.endsWith("color");
    return isRole ? colorOf(value) : value;
  };

  const draw = () => {
    if (!window.Plotly) {
      for (const key of Object.keys(figures)) {
        document.getElementById(key).textContent =
          "This chart needs plotly.js from cdn.plot.ly, which could not be loaded. The tables have the same numbers; " +
          "sinkgd report, without --cdn, makes a page that needs no network.";
      }
      return;
    }
    // Touch scrolls the page; only a mouse zooms by a box.
    const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    const family = getComputedStyle(document.body).fontFamily;
    for (const [key, figure] of Object.entries(figures)) {
      const { data, layout } = paint(figure);
      const font = { ...layout.font, family };
      Plotly.react(document.getElementById(key), data, { dragmode, ...layout, font }, config);
    }
  };

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches);
  const label = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
  };

  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    label();
    draw();
  });
  systemIsDark.addEventListener("change", () => {
    label();
    draw();
  });

  label();
  draw();
})();
