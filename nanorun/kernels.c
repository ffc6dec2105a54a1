/* The passes of a small GPT's training step that are no large matrix product, fp32 on a CPU, one read of the memory each.
 *
 * nanorun/kernels.py compiles, loads and calls this file, and says what each function is for. Rows are shared out among
 * threads, and no sum depends on how many there are. N rows, C channels, B rows of T positions, H heads of D channels.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define W 16
#else
#define W 8
#endif
typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));

/* exp to 2 units in the last place; NaN stays NaN. Free of branches, so that loops over it become vector code. */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
    return (p * r * r + r + 1.0f) * power.f;
}

static inline float tanh_(float x) { return 1.0f - 2.0f / (exp_(2.0f * x) + 1.0f); }

void rms_norm(int64_t N, int64_t C, float eps, const float *x, float *y, float *scale_N) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const float *a = x + n * C;
        float sum = 0;
        for (int64_t c = 0; c < C; c++) sum += a[c] * a[c];
        float r = 1.0f / sqrtf(sum / C + eps);
        scale_N[n] = r;
        for (int64_t c = 0; c < C; c++) y[n * C + c] = a[c] * r;
    }
}

void rms_norm_backward(int64_t N, int64_t C, const float *x, const float *scale_N, const float *g, float *dx) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const float *a = x + n * C, *b = g + n * C;
        float r = scale_N[n], sum = 0;
        for (int64_t c = 0; c < C; c++) sum += a[c] * b[c];
        float m = sum * r * r / C;
        for (int64_t c = 0; c < C; c++) dx[n * C + c] = r * (b[c] - a[c] * m);
    }
}

void layer_norm(int64_t N, int64_t C, float eps, const float *x, const float *w, const float *b, float *y,
                float *mean_N, float *scale_N) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const float *a = x + n * C;
        float sum = 0, squares = 0;
        for (int64_t c = 0; c < C; c++) sum += a[c];
        float m = sum / C;
        for (int64_t c = 0; c < C; c++) squares += (a[c] - m) * (a[c] - m);
        float r = 1.0f / sqrtf(squares / C + eps);
        mean_N[n] = m, scale_N[n] = r;
        float *out = y + n * C;
        if (b) for (int64_t c = 0; c < C; c++) out[c] = (a[c] - m) * r * w[c] + b[c];
        else for (int64_t c = 0; c < C; c++) out[c] = (a[c] - m) * r * w[c];
    }
}

/* dw_PC and db_PC hold a part of the sum over rows for each of P ranges of rows. */
void layer_norm_backward(int64_t N, int64_t C, int64_t P, const float *x, const float *w, const float *mean_N,
                         const float *scale_N, const float *g, float *dx, float *dw_PC, float *db_PC) {
#pragma omp parallel for
    for (int64_t p = 0; p < P; p++) {
        float *dw = dw_PC + p * C, *db = db_PC + p * C;
        memset(dw, 0, 4 * C), memset(db, 0, 4 * C);
        for (int64_t n = p * N / P; n < (p + 1) * N / P; n++) {
            const float *a = x + n * C, *b = g + n * C;
            float m = mean_N[n], r = scale_N[n], sum = 0, product = 0;
            for (int64_t c = 0; c < C; c++) {
                float gw = b[c] * w[c], hat = (a[c] - m) * r;
                sum += gw, product += gw * hat;
                dw[c] += b[c] * hat, db[c] += b[c];
            }
            sum /= C, product /= C;
            for (int64_t c = 0; c < C; c++) dx[n * C + c] = r * (b[c] * w[c] - sum - (a[c] - m) * r * product);
        }
    }
}

#define GELU_A 0.7978845608f
#define GELU_B 0.0356774081f

void gelu(int64_t N, const float *x, float *y) {
#pragma omp parallel for simd
    for (int64_t n = 0; n < N; n++) {
        float u = x[n] * (GELU_A + GELU_B * x[n] * x[n]);
        y[n] = x[n] / (1.0f + exp_(-2.0f * u));
    }
}

void gelu_backward(int64_t N, const float *x, const float *g, float *dx) {
#pragma omp parallel for simd
    for (int64_t n = 0; n < N; n++) {
        float square = x[n] * x[n], u = x[n] * (GELU_A + GELU_B * square);
        float s = 1.0f / (1.0f + exp_(-2.0f * u));
        dx[n] = g[n] * s * (1.0f + 2.0f * x[n] * (1.0f - s) * (GELU_A + 3.0f * GELU_B * square));
    }
}

/* The normal distribution up to x, by formula 7.1.26 of Abramowitz and Stegun, which torch's erf has too on a CPU; `bell`
 * is exp(-x^2 / 2). */
static inline float normal_below(float x, float bell) {
    float t = 1.0f / (1.0f + 0.231641888f * fabsf(x));
    float tail = 1.061405429f * t - 1.453152027f;
    tail = tail * t + 1.421413741f;
    tail = tail * t - 0.284496736f;
    tail = 0.5f * (tail * t + 0.254829592f) * t * bell;
    return x < 0.0f ? tail : 1.0f - tail;
}

void gelu_exact(int64_t N, const float *x, float *y) {
#pragma omp parallel for simd
    for (int64_t n = 0; n < N; n++) y[n] = x[n] * normal_below(x[n], exp_(-0.5f * x[n] * x[n]));
}

void gelu_exact_backward(int64_t N, const float *x, const float *g, float *dx) {
#pragma omp parallel for simd
    for (int64_t n = 0; n < N; n++) {
        float bell = exp_(-0.5f * x[n] * x[n]);
        dx[n] = g[n] * (normal_below(x[n], bell) + 0.3989422804f * x[n] * bell);
    }
}

void relu2(int64_t N, const float *x, float *y) {
#pragma omp parallel for simd
    for (int64_t n = 0; n < N; n++) {
        float r = x[n] < 0.0f ? 0.0f : x[n];
        y[n] = r * r;
    }
}

void relu2_backward(int64_t N, const float *x, const float *g, float *dx) {
#pragma omp parallel for simd
    for (int64_t n = 0; n < N; n++) dx[n] = 2.0f * g[n] * (x[n] < 0.0f ? 0.0f : x[n]);
}

/* Losses of the rows, logits bent under ±cap where it is not 0; where `wants_grad`, the gradient takes the logits' place.
 * Returns 1 where a target is neither in the vocabulary nor `ignored`, else 0. */
int cross_entropy(int64_t N, int64_t V, float cap, float *logits, const int64_t *targets_N, int64_t ignored,
                  int64_t wants_grad, float *loss_N) {
    int wrong = 0;
#pragma omp parallel for reduction(| : wrong)
    for (int64_t n = 0; n < N; n++) {
        float *z = logits + n * V;
        int64_t target = targets_N[n];
        if (target == ignored) {
            loss_N[n] = 0;
            if (wants_grad) memset(z, 0, 4 * V);
            continue;
        }
        if (target < 0 || target >= V) { wrong = 1; continue; }
        if (cap) for (int64_t v = 0; v < V; v++) z[v] = cap * tanh_(z[v] / cap);
        float top = z[0], sum = 0;
        for (int64_t v = 1; v < V; v++) top = z[v] > top ? z[v] : top;
        for (int64_t v = 0; v < V; v++) sum += exp_(z[v] - top);
        loss_N[n] = logf(sum) + top - z[target];
        if (!wants_grad) continue;
        float at_target = z[target], over = 1.0f / sum, over_cap = cap ? 1.0f / cap : 0.0f;
        for (int64_t v = 0; v < V; v++) {
            float t = z[v] * over_cap;
            z[v] = exp_(z[v] - top) * over * (1.0f - t * t);
        }
        z[target] -= 1.0f - at_target * over_cap * at_target * over_cap;
    }
    return wrong;
}

#define TILE(M, V)                                                                                              \
    static inline __attribute__((always_inline)) void tile_##M##_##V(                                           \
        int64_t K, const float *a, int64_t row, int64_t column, const float *b, int64_t ldb, float *c, int64_t ldc, \
        int adds) {                                                                                             \
        vec sum[M][V];                                                                                          \
        for (int m = 0; m < M; m++)                                                                             \
            for (int v = 0; v < V; v++) sum[m][v] = adds ? *(vec *)(c + m * ldc + v * W) : (vec){0};           \
        for (int64_t k = 0; k < K; k++)                                                                         \
            for (int m = 0; m < M; m++)                                                                         \
                for (int v = 0; v < V; v++)                                                                     \
                    sum[m][v] += a[m * row + k * column] * *(const vec *)(b + k * ldb + v * W);                \
        for (int m = 0; m < M; m++)                                                                             \
            for (int v = 0; v < V; v++) *(vec *)(c + m * ldc + v * W) = sum[m][v];                             \
    }
TILE(6, 2)
TILE(1, 2)
TILE(6, 1)
TILE(1, 1)

/* c (M, N) = a (M, K) b (K, N), added to c where `adds`; a has any strides; N is a multiple of W. For operands in cache. */
static void multiply(int64_t M, int64_t N, int64_t K, const float *a, int64_t row, int64_t column, const float *b,
                     int64_t ldb, float *c, int64_t ldc, int adds) {
    for (int64_t n = 0; n < N; n += 2 * W) {
        int64_t m = 0;
        if (N - n >= 2 * W) {
            for (; m + 6 <= M; m += 6) tile_6_2(K, a + m * row, row, column, b + n, ldb, c + m * ldc + n, ldc, adds);
            for (; m < M; m++) tile_1_2(K, a + m * row, row, column, b + n, ldb, c + m * ldc + n, ldc, adds);
        } else {
            for (; m + 6 <= M; m += 6) tile_6_1(K, a + m * row, row, column, b + n, ldb, c + m * ldc + n, ldc, adds);
            for (; m < M; m++) tile_1_1(K, a + m * row, row, column, b + n, ldb, c + m * ldc + n, ldc, adds);
        }
    }
}

static void transpose(int64_t M, int64_t N, const float *a, float *b) {
    for (int64_t n = 0; n < N; n++)
        for (int64_t m = 0; m < M; m++) b[n * M + m] = a[m * N + n];
}

/* What attention does to queries and keys: a norm over the channels of a head where eps >= 0, a turn where cos is given. */
typedef struct { int64_t T, H, D; float eps; const float *cos, *sin; } Shape;

static void load(const Shape *s, const float *from, int prepares, float *to, float *scale_T) {
    int64_t D = s->D, half = D / 2;
    for (int64_t t = 0; t < s->T; t++, to += D) {
        const float *x = from + t * 3 * s->H * D;
        float r = 1;
        if (prepares && s->eps >= 0) {
            float sum = 0;
            for (int64_t d = 0; d < D; d++) sum += x[d] * x[d];
            r = 1.0f / sqrtf(sum / D + s->eps);
        }
        if (prepares) scale_T[t] = r;
        if (!prepares || !s->cos) {
            for (int64_t d = 0; d < D; d++) to[d] = x[d] * r;
            continue;
        }
        const float *c = s->cos + t * D, *n = s->sin + t * D;
        for (int64_t d = 0; d < half; d++) {
            to[d] = r * (x[d] * c[d] + x[d + half] * n[d]);
            to[d + half] = r * (x[d + half] * c[d] - x[d] * n[d]);
        }
    }
}

/* Write the gradient of what `load` read, given that of what it made; `g` is used up. */
static void store(const Shape *s, float *g, const float *from, int prepared, const float *scale_T, float *to) {
    int64_t D = s->D, half = D / 2;
    for (int64_t t = 0; t < s->T; t++, g += D) {
        const float *x = from + t * 3 * s->H * D;
        float *out = to + t * 3 * s->H * D;
        if (prepared && s->cos) {
            const float *c = s->cos + t * D, *n = s->sin + t * D;
            for (int64_t d = 0; d < half; d++) {
                float first = g[d] * c[d] - g[d + half] * n[d];
                g[d + half] = g[d + half] * c[d] + g[d] * n[d];
                g[d] = first;
            }
        }
        float r = 1, m = 0;
        if (prepared && s->eps >= 0) {
            float sum = 0;
            r = scale_T[t];
            for (int64_t d = 0; d < D; d++) sum += x[d] * g[d];
            m = sum * r * r / D;
        }
        for (int64_t d = 0; d < D; d++) out[d] = r * (g[d] - x[d] * m);
    }
}

#define QUERIES 32

/* Weights of `rows` queries from position `first` over `keys` keys: masked scores, less the row's `log_sum` where it is
 * known (`knows`), found and kept where not. */
static void weigh(float *s, int64_t rows, int64_t first, int64_t keys, float *log_sum, int knows) {
    for (int64_t i = 0; i < rows; i++, s += keys) {
        int64_t seen = first + i + 1;
        if (!knows) {
            float top = s[0], sum = 0;
            for (int64_t j = 1; j < seen; j++) top = s[j] > top ? s[j] : top;
            for (int64_t j = 0; j < seen; j++) sum += exp_(s[j] - top);
            log_sum[i] = top + logf(sum);
        }
        float less = log_sum[i];
        for (int64_t j = 0; j < seen; j++) s[j] = exp_(s[j] - less);
        memset(s + seen, 0, 4 * (keys - seen));
    }
}

/* 1/(1-p) or 0 for each weight of a query, as nanorun.dropout.kept draws it. */
static inline float kept(uint32_t line, uint32_t column, int32_t least, float scale) {
    uint32_t x = line + column;
    x += 2 * x * x;
    x += 2 * x * x;
    return (int32_t)x >= least ? scale : 0.0f;
}

/* y_BTHD = causal attention of qkv_BT3HD. T and D are multiples of 16. lines_BHT and columns_T are those of the dropout
 * of weights, or null; its other two numbers are the least number kept and 1/(1-p). Returns 0, or 1 without memory. */
int attention(int64_t B, int64_t T, int64_t H, int64_t D, float eps, const float *cos, const float *sin,
              const int32_t *lines, const int32_t *columns, int64_t least, float scale, const float *qkv, float *y,
              float *log_sum_BHT) {
    Shape s = {T, H, D, eps, cos, sin};
    int failed = 0;
#pragma omp parallel for reduction(| : failed)
    for (int64_t bh = 0; bh < B * H; bh++) {
        int64_t b = bh / H, h = bh % H;
        const float *in = qkv + b * T * 3 * H * D + h * D;
        float *memory = aligned_alloc(64, 4 * (4 * T * D + QUERIES * T + T));
        if (!memory) { failed = 1; continue; }
        float *q = memory, *k = q + T * D, *kT = k + T * D, *v = kT + T * D, *p = v + T * D, *unused = p + QUERIES * T;
        load(&s, in, 1, q, unused), load(&s, in + H * D, 1, k, unused), load(&s, in + 2 * H * D, 0, v, unused);
        float root = 1.0f / sqrtf(D);
        for (int64_t i = 0; i < T * D; i++) k[i] *= root;
        transpose(T, D, k, kT);
        for (int64_t first = 0; first < T; first += QUERIES) {
            int64_t rows = T - first < QUERIES ? T - first : QUERIES, keys = first + rows;
            multiply(rows, keys, D, q + first * D, D, 1, kT, T, p, keys, 0);
            weigh(p, rows, first, keys, log_sum_BHT + bh * T + first, 0);
            if (lines) for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < keys; j++)
                    p[i * keys + j] *= kept(lines[bh * T + first + i], columns[j], least, scale);
            multiply(rows, D, keys, p, keys, 1, v, D, y + (b * T + first) * H * D + h * D, H * D, 0);
        }
        free(memory);
    }
    return failed;
}

/* The gradient of qkv, given that of y; scores and weights are computed again. */
int attention_backward(int64_t B, int64_t T, int64_t H, int64_t D, float eps, const float *cos, const float *sin,
                       const int32_t *lines, const int32_t *columns, int64_t least, float scale, const float *qkv,
                       const float *y, const float *log_sum_BHT, const float *dy, float *dqkv) {
    Shape s = {T, H, D, eps, cos, sin};
    int failed = 0;
#pragma omp parallel for reduction(| : failed)
    for (int64_t bh = 0; bh < B * H; bh++) {
        int64_t b = bh / H, h = bh % H, n = T * D;
        int64_t at = b * T * 3 * H * D + h * D;
        float *memory = aligned_alloc(64, 4 * (8 * n + 2 * QUERIES * T + 2 * T));
        if (!memory) { failed = 1; continue; }
        float *q = memory, *k = q + n, *v = k + n, *kT = v + n, *vT = kT + n, *dq = vT + n, *dk = dq + n, *dv = dk + n;
        float *p = dv + n, *dp = p + QUERIES * T, *q_scale = dp + QUERIES * T, *k_scale = q_scale + T;
        load(&s, qkv + at, 1, q, q_scale), load(&s, qkv + at + H * D, 1, k, k_scale);
        load(&s, qkv + at + 2 * H * D, 0, v, 0);
        float root = 1.0f / sqrtf(D);
        for (int64_t i = 0; i < n; i++) k[i] *= root;
        transpose(T, D, k, kT), transpose(T, D, v, vT);
        for (int64_t first = 0; first < T; first += QUERIES) {
            int64_t rows = T - first < QUERIES ? T - first : QUERIES, keys = first + rows;
            const float *gy = dy + (b * T + first) * H * D + h * D, *out = y + (b * T + first) * H * D + h * D;
            multiply(rows, keys, D, q + first * D, D, 1, kT, T, p, keys, 0);
            weigh(p, rows, first, keys, (float *)log_sum_BHT + bh * T + first, 1);
            multiply(rows, keys, D, gy, H * D, 1, vT, T, dp, keys, 0);
            for (int64_t i = 0; i < rows; i++) {
                float delta = 0, *w = p + i * keys, *dw = dp + i * keys;
                for (int64_t d = 0; d < D; d++) delta += gy[i * H * D + d] * out[i * H * D + d];
                if (!lines) {
                    for (int64_t j = 0; j < keys; j++) dw[j] = w[j] * (dw[j] - delta);
                    continue;
                }
                uint32_t line = lines[bh * T + first + i];
                for (int64_t j = 0; j < keys; j++) {
                    float keep = kept(line, columns[j], least, scale);
                    dw[j] = w[j] * (dw[j] * keep - delta);
                    w[j] *= keep;
                }
            }
            /* The block's own keys are met here for the first time, and the earlier ones' sums go on. */
            multiply(rows, D, keys, dp, keys, 1, k, D, dq + first * D, D, 0);
            multiply(first, D, rows, dp, 1, keys, q + first * D, D, dk, D, 1);
            multiply(rows, D, rows, dp + first, 1, keys, q + first * D, D, dk + first * D, D, 0);
            multiply(first, D, rows, p, 1, keys, gy, H * D, dv, D, 1);
            multiply(rows, D, rows, p + first, 1, keys, gy, H * D, dv + first * D, D, 0);
        }
        for (int64_t i = 0; i < n; i++) dk[i] *= root;
        store(&s, dq, qkv + at, 1, q_scale, dqkv + at);
        store(&s, dk, qkv + at + H * D, 1, k_scale, dqkv + at + H * D);
        store(&s, dv, qkv + at + 2 * H * D, 0, 0, dqkv + at + 2 * H * D);
        free(memory);
    }
    return failed;
}
