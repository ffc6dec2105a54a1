/* The passes of a small GPT's training step, fp32 on a CPU: norms, activations and loss with one read of the memory each,
 * and a whole block of the model.
 *
 * nanorun/kernels.py compiles and loads this file, and says with nanorun/block.py what each function is for. Rows are
 * shared out among threads, and no sum depends on how many there are. N rows, C channels, B rows of T positions, H heads
 * of D channels.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define W 16
#else
#define W 8
#endif
typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * W)));

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

static inline float rms_row(int64_t C, float eps, const float *x, float *y) {
    float sum = 0;
    for (int64_t c = 0; c < C; c++) sum += x[c] * x[c];
    float r = 1.0f / sqrtf(sum / C + eps);
    for (int64_t c = 0; c < C; c++) y[c] = x[c] * r;
    return r;
}

static inline void rms_row_backward(int64_t C, const float *x, float r, const float *g, float *dx) {
    float sum = 0;
    for (int64_t c = 0; c < C; c++) sum += x[c] * g[c];
    float m = sum * r * r / C;
    for (int64_t c = 0; c < C; c++) dx[c] = r * (g[c] - x[c] * m);
}

static inline float layer_row(int64_t C, float eps, const float *x, const float *w, const float *b, float *y,
                              float *mean) {
    float sum = 0, squares = 0;
    for (int64_t c = 0; c < C; c++) sum += x[c];
    float m = sum / C;
    for (int64_t c = 0; c < C; c++) squares += (x[c] - m) * (x[c] - m);
    float r = 1.0f / sqrtf(squares / C + eps);
    *mean = m;
    if (b) for (int64_t c = 0; c < C; c++) y[c] = (x[c] - m) * r * w[c] + b[c];
    else for (int64_t c = 0; c < C; c++) y[c] = (x[c] - m) * r * w[c];
    return r;
}

/* Adds the row's part to dw and db. */
static inline void layer_row_backward(int64_t C, const float *x, const float *w, float m, float r, const float *g,
                                      float *dx, float *dw, float *db) {
    float sum = 0, product = 0;
    for (int64_t c = 0; c < C; c++) {
        float gw = g[c] * w[c], hat = (x[c] - m) * r;
        sum += gw, product += gw * hat;
        dw[c] += g[c] * hat, db[c] += g[c];
    }
    sum /= C, product /= C;
    for (int64_t c = 0; c < C; c++) dx[c] = r * (g[c] * w[c] - sum - (x[c] - m) * r * product);
}

void rms_norm(int64_t N, int64_t C, float eps, const float *x, float *y, float *scale_N) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) scale_N[n] = rms_row(C, eps, x + n * C, y + n * C);
}

void rms_norm_backward(int64_t N, int64_t C, const float *x, const float *scale_N, const float *g, float *dx) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) rms_row_backward(C, x + n * C, scale_N[n], g + n * C, dx + n * C);
}

void layer_norm(int64_t N, int64_t C, float eps, const float *x, const float *w, const float *b, float *y,
                float *mean_N, float *scale_N) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) scale_N[n] = layer_row(C, eps, x + n * C, w, b, y + n * C, mean_N + n);
}

/* dw_PC and db_PC hold a part of the sum over rows for each of P ranges of rows. */
void layer_norm_backward(int64_t N, int64_t C, int64_t P, const float *x, const float *w, const float *mean_N,
                         const float *scale_N, const float *g, float *dx, float *dw_PC, float *db_PC) {
#pragma omp parallel for
    for (int64_t p = 0; p < P; p++) {
        float *dw = dw_PC + p * C, *db = db_PC + p * C;
        memset(dw, 0, 4 * C), memset(db, 0, 4 * C);
        for (int64_t n = p * N / P; n < (p + 1) * N / P; n++)
            layer_row_backward(C, x + n * C, w, mean_N[n], scale_N[n], g + n * C, dx + n * C, dw, db);
    }
}

#define GELU_A 0.7978845608f
#define GELU_B 0.0356774081f

static inline float gelu_(float x) { return x / (1.0f + exp_(-2.0f * x * (GELU_A + GELU_B * x * x))); }

static inline float gelu_slope(float x) {
    float square = x * x, s = 1.0f / (1.0f + exp_(-2.0f * x * (GELU_A + GELU_B * square)));
    return s * (1.0f + 2.0f * x * (1.0f - s) * (GELU_A + 3.0f * GELU_B * square));
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

static inline float gelu_exact_(float x) { return x * normal_below(x, exp_(-0.5f * x * x)); }

static inline float gelu_exact_slope(float x) {
    float bell = exp_(-0.5f * x * x);
    return normal_below(x, bell) + 0.3989422804f * x * bell;
}

static inline float relu2_(float x) {
    float r = x < 0.0f ? 0.0f : x;
    return r * r;
}

static inline float relu2_slope(float x) { return 2.0f * (x < 0.0f ? 0.0f : x); }

/* For each activation: the passes over N numbers, and those of one thread, which makes the activation again beside its
 * gradient g, in place. */
#define ACTIVATION(NAME)                                                                              \
    void NAME(int64_t N, const float *x, float *y) {                                                  \
        _Pragma("omp parallel for simd") for (int64_t n = 0; n < N; n++) y[n] = NAME##_(x[n]);        \
    }                                                                                                 \
    void NAME##_backward(int64_t N, const float *x, const float *g, float *dx) {                      \
        _Pragma("omp parallel for simd") for (int64_t n = 0; n < N; n++) dx[n] = g[n] * NAME##_slope(x[n]); \
    }                                                                                                 \
    static void NAME##_alone(int64_t N, const float *x, float *y) {                                   \
        _Pragma("omp simd") for (int64_t n = 0; n < N; n++) y[n] = NAME##_(x[n]);                     \
    }                                                                                                 \
    static void NAME##_alone_backward(int64_t N, const float *x, float *g, float *y) {                \
        _Pragma("omp simd") for (int64_t n = 0; n < N; n++) {                                         \
            y[n] = NAME##_(x[n]);                                                                     \
            g[n] *= NAME##_slope(x[n]);                                                               \
        }                                                                                             \
    }
ACTIVATION(gelu)
ACTIVATION(gelu_exact)
ACTIVATION(relu2)

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
#ifdef __AVX512F__
#define M_TILE 8
TILE(8, 2)
TILE(8, 1)
#define WIDE tile_8_2
#define NARROW tile_8_1
#else
#define M_TILE 6
TILE(6, 2)
TILE(6, 1)
#define WIDE tile_6_2
#define NARROW tile_6_1
#endif
TILE(4, 2)
TILE(1, 2)
TILE(4, 1)
TILE(1, 1)
#define PANEL (2 * W)

/* c (M, N) = a (M, K) b (K, N), added to c where `adds`; a has any strides; N is a multiple of W. b's panels of PANEL
 * columns begin `step` apart and have rows of ldb. For operands in cache. */
static void multiply_panels(int64_t M, int64_t N, int64_t K, const float *a, int64_t row, int64_t column, const float *b,
                            int64_t ldb, int64_t step, float *c, int64_t ldc, int adds) {
    for (int64_t n = 0; n < N; n += PANEL, b += step) {
        int64_t m = 0;
        float *to = c + n;
        if (N - n >= PANEL) {
            for (; m + M_TILE <= M; m += M_TILE) WIDE(K, a + m * row, row, column, b, ldb, to + m * ldc, ldc, adds);
            for (; m + 4 <= M; m += 4) tile_4_2(K, a + m * row, row, column, b, ldb, to + m * ldc, ldc, adds);
            for (; m < M; m++) tile_1_2(K, a + m * row, row, column, b, ldb, to + m * ldc, ldc, adds);
        } else {
            for (; m + M_TILE <= M; m += M_TILE) NARROW(K, a + m * row, row, column, b, ldb, to + m * ldc, ldc, adds);
            for (; m + 4 <= M; m += 4) tile_4_1(K, a + m * row, row, column, b, ldb, to + m * ldc, ldc, adds);
            for (; m < M; m++) tile_1_1(K, a + m * row, row, column, b, ldb, to + m * ldc, ldc, adds);
        }
    }
}

/* The same, with b as it lies. */
static void multiply(int64_t M, int64_t N, int64_t K, const float *a, int64_t row, int64_t column, const float *b,
                     int64_t ldb, float *c, int64_t ldc, int adds) {
    multiply_panels(M, N, K, a, row, column, b, ldb, PANEL, c, ldc, adds);
}

/* b = a transposed, both of W by W numbers, their rows lda and ldb apart. */
static inline void transpose_tile(const float *a, int64_t lda, float *b, int64_t ldb) {
#ifdef __clang__
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) b[j * ldb + i] = a[i * lda + j];
#else
    vec x[W];
    for (int i = 0; i < W; i++) x[i] = *(const vec *)(a + i * lda);
    /* Halves change places, then halves of halves. */
#pragma GCC unroll 4
    for (int s = 1; s < W; s *= 2) {
        mask first, second;
        for (int j = 0; j < W; j++) first[j] = j & s ? j - s + W : j, second[j] = j & s ? j + W : j + s;
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
            if (i & s) continue;
            vec one = x[i], other = x[i + s];
            x[i] = __builtin_shuffle(one, other, first), x[i + s] = __builtin_shuffle(one, other, second);
        }
    }
    for (int i = 0; i < W; i++) *(vec *)(b + i * ldb) = x[i];
#endif
}

/* b (N, M) = a (M, N) transposed, rows lda and ldb apart; M and N are multiples of W. */
static void transpose(int64_t M, int64_t N, const float *a, int64_t lda, float *b, int64_t ldb) {
    for (int64_t m = 0; m < M; m += W)
        for (int64_t n = 0; n < N; n += W) transpose_tile(a + m * lda + n, lda, b + n * ldb + m, ldb);
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

/* The largest of N numbers, a multiple of W. */
static inline float largest(int64_t N, const float *s) {
    vec top = *(const vec *)s;
    for (int64_t j = W; j < N; j += W) {
        vec x = *(const vec *)(s + j);
        mask above = x > top;
        top = (vec)(((mask)x & above) | ((mask)top & ~above));
    }
    float found = top[0];
    for (int i = 1; i < W; i++) found = top[i] > found ? top[i] : found;
    return found;
}

/* Weights of `rows` queries from position `first` over `keys` keys, a multiple of 16: scores, masked, less the row's
 * `log_sum` where it is known (`knows`), found and kept where not. */
static void weigh(float *s, int64_t rows, int64_t first, int64_t keys, float *log_sum, int knows) {
    for (int64_t i = 0; i < rows; i++, s += keys) {
        /* Whole vectors: what is behind the last key that is seen weighs nothing beside it, and is set to 0 at the end. */
        int64_t seen = first + i + 1, near = (seen + 15) / 16 * 16;
        for (int64_t j = seen; j < near; j++) s[j] = -INFINITY;
        if (knows) {
            float less = log_sum[i];
            for (int64_t j = 0; j < near; j++) s[j] = exp_(s[j] - less);
        } else {
            float top = largest(near, s), sum = 0;
            for (int64_t j = 0; j < near; j++) sum += s[j] = exp_(s[j] - top);
            log_sum[i] = top + logf(sum);
            float over = 1.0f / sum;
            for (int64_t j = 0; j < near; j++) s[j] *= over;
        }
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

/* Dropout's numbers: the least of the int32 that are kept, and 1/(1-p). */
typedef struct { int64_t least; float scale; } Kept;

static int64_t attention_room(int64_t T, int64_t D) { return 4 * T * D + QUERIES * T + T; }
static int64_t attention_backward_room(int64_t T, int64_t D) { return 8 * T * D + 2 * QUERIES * T + 2 * T; }

/* One head of one row of y_BTHD, the causal attention of qkv_BT3HD, in memory of attention_room numbers. T and D are
 * multiples of 16. lines_BHT and columns_T are those of the dropout of weights, or null. */
static void attend(const Shape *s, int64_t bh, const int32_t *lines, const int32_t *columns, Kept keep, const float *qkv,
                   float *y, float *log_sum_BHT, float *memory) {
    int64_t T = s->T, H = s->H, D = s->D, b = bh / H, h = bh % H;
    const float *in = qkv + b * T * 3 * H * D + h * D;
    float *q = memory, *k = q + T * D, *kT = k + T * D, *v = kT + T * D, *p = v + T * D, *unused = p + QUERIES * T;
    load(s, in, 1, q, unused), load(s, in + H * D, 1, k, unused), load(s, in + 2 * H * D, 0, v, unused);
    float root = 1.0f / sqrtf(D);
    for (int64_t i = 0; i < T * D; i++) k[i] *= root;
    transpose(T, D, k, D, kT, T);
    for (int64_t first = 0; first < T; first += QUERIES) {
        int64_t rows = T - first < QUERIES ? T - first : QUERIES, keys = first + rows;
        multiply(rows, keys, D, q + first * D, D, 1, kT, T, p, keys, 0);
        weigh(p, rows, first, keys, log_sum_BHT + bh * T + first, 0);
        if (lines) for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < keys; j++)
                p[i * keys + j] *= kept(lines[bh * T + first + i], columns[j], keep.least, keep.scale);
        multiply(rows, D, keys, p, keys, 1, v, D, y + (b * T + first) * H * D + h * D, H * D, 0);
    }
}

/* The gradient of qkv, given that of y, in memory of attention_backward_room numbers. Scores and weights are computed
 * again. */
static void attend_backward(const Shape *s, int64_t bh, const int32_t *lines, const int32_t *columns, Kept keep,
                            const float *qkv, const float *y, const float *log_sum_BHT, const float *dy, float *dqkv,
                            float *memory) {
    int64_t T = s->T, H = s->H, D = s->D, b = bh / H, h = bh % H, n = T * D;
    int64_t at = b * T * 3 * H * D + h * D;
    float *q = memory, *k = q + n, *v = k + n, *kT = v + n, *vT = kT + n, *dq = vT + n, *dk = dq + n, *dv = dk + n;
    float *p = dv + n, *dp = p + QUERIES * T, *q_scale = dp + QUERIES * T, *k_scale = q_scale + T;
    load(s, qkv + at, 1, q, q_scale), load(s, qkv + at + H * D, 1, k, k_scale);
    load(s, qkv + at + 2 * H * D, 0, v, 0);
    float root = 1.0f / sqrtf(D);
    for (int64_t i = 0; i < n; i++) k[i] *= root;
    transpose(T, D, k, D, kT, T), transpose(T, D, v, D, vT, T);
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
                float one = kept(line, columns[j], keep.least, keep.scale);
                dw[j] = w[j] * (dw[j] * one - delta);
                w[j] *= one;
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
    store(s, dq, qkv + at, 1, q_scale, dqkv + at);
    store(s, dk, qkv + at + H * D, 1, k_scale, dqkv + at + H * D);
    store(s, dv, qkv + at + 2 * H * D, 0, 0, dqkv + at + 2 * H * D);
}

/* Memory of a thread's own for so many numbers; null where there is none. */
static float *own_memory(int64_t numbers) { return aligned_alloc(64, (4 * numbers + 63) / 64 * 64); }

/* A block of the model: attention and MLP, each behind its norm, each added to what came in. N = B*T tokens, M channels
 * inside the MLP. The field names are those of nanorun/block.py. Where a pointer is null, its part is left out. */
typedef struct {
    int64_t B, T, C, H, M;
    int64_t layer_norm; /* 0: RMS */
    int64_t activation; /* 0: gelu, 1: gelu_exact, 2: relu2 */
    int64_t least;      /* of Kept, as scale is */
    float eps, qk_eps, scale;
    const float *norm_1_weight, *norm_1_bias, *norm_2_weight, *norm_2_bias; /* (C) */
    const float *qkv_weight, *qkv_bias, *proj_weight, *proj_bias;           /* (3C, C), (C, C) */
    const float *up_weight, *up_bias, *down_weight, *down_bias;             /* (M, C), (C, M) */
    const float *cos, *sin;                                                 /* (T, C / H) */
    const int32_t *attention_lines, *attention_columns;                     /* (B, H*T), (T) */
    const int32_t *proj_lines, *down_lines, *columns;                       /* (B, T) twice, (C) */
    const float *x;                                                         /* (N, C), what comes in */
    float *qkv, *y, *log_sum, *middle, *hidden;                             /* (N, 3C), (N, C), (B, H, T), (N, C), (N, M) */
    float *out;                                                             /* (N, C) */
    float *packed;                                                          /* all four weights */
    /* Of the backward pass: the gradient of what comes out, */
    const float *grad;
    /* those it makes, */
    float *dx, *norm_1_dweight, *norm_1_dbias, *norm_2_dweight, *norm_2_dbias;
    float *qkv_dweight, *qkv_dbias, *proj_dweight, *proj_dbias, *up_dweight, *up_dbias, *down_dweight, *down_dbias;
    /* and room for what is between: both norms' results and the gradients of the middle, of what both projections made
     * and of attention, (N, C); the activation's result and the gradient of its input, (N, M); that of qkv, (N, 3C); and
     * for each tile of tokens its part of the norms' weights, (tiles, 4C). */
    float *normed_1, *normed_2, *dmiddle, *dproj, *ddown, *dy, *activated, *dhidden, *dqkv, *parts;
} Block;

/* Tokens that a thread takes through a chain of products at once. */
#define ROWS 48

static int64_t tiles_of(const Block *s) { return (s->B * s->T + ROWS - 1) / ROWS; }
static int64_t rows_of(const Block *s, int64_t tile) {
    int64_t left = s->B * s->T - tile * ROWS;
    return left < ROWS ? left : ROWS;
}
static int64_t panels(int64_t N) { return (N + PANEL - 1) / PANEL; }

/* This thread's share of n things, [*from, *to). */
static void share(int64_t n, int64_t *from, int64_t *to) {
    int64_t me = omp_get_thread_num(), n_threads = omp_get_num_threads();
    *from = n * me / n_threads, *to = n * (me + 1) / n_threads;
}

/* A matrix (K, N) to multiply by, whose panels of PANEL columns begin `step` apart and have rows of ldb. */
typedef struct { const float *b; int64_t ldb, step; } Panels;

/* Rows up to so long are read where they lie: of longer ones few share a page of memory. */
#define SHORT_ROW 512

/* b (K, N) with rows one behind the other, or columns where `turned`, as panels; each thread packs its share into `to`. */
static Panels pack(int64_t K, int64_t N, const float *b, int turned, float *to) {
    if (!turned && N <= SHORT_ROW) return (Panels){b, N, PANEL};
    int64_t from, until;
    share(panels(N), &from, &until);
    for (int64_t p = from; p < until; p++) {
        int64_t n = p * PANEL, width = N - n < PANEL ? N - n : PANEL;
        float *panel = to + n * K;
        if (turned) transpose(width, K, b + n * K, K, panel, PANEL);
        else for (int64_t k = 0; k < K; k++) memcpy(panel + k * PANEL, b + k * N + n, 4 * width);
    }
    return (Panels){to, PANEL, K * PANEL};
}

/* c (rows, N) = a (rows, K) b, added to c where `adds`. */
static void product(int64_t rows, int64_t N, int64_t K, const float *a, Panels b, float *c, int adds) {
    multiply_panels(rows, N, K, a, K, 1, b.b, b.ldb, b.step, c, N, adds);
}

static void add_bias(int64_t rows, int64_t N, const float *bias, float *c) {
    if (bias) for (int64_t n = 0; n < rows; n++)
        for (int64_t i = 0; i < N; i++) c[n * N + i] += bias[i];
}

/* c times what dropout keeps of tokens from `first` on. */
static void drop(const Block *s, const int32_t *lines, int64_t first, int64_t rows, const float *c, float *to) {
    for (int64_t n = 0; n < rows; n++)
        for (int64_t i = 0; i < s->C; i++)
            to[n * s->C + i] = c[n * s->C + i] * kept(lines[first + n], s->columns[i], s->least, s->scale);
}

static void norm(const Block *s, const float *w, const float *b, int64_t rows, const float *x, float *y) {
    float mean;
    for (int64_t n = 0; n < rows; n++)
        if (s->layer_norm) layer_row(s->C, s->eps, x + n * s->C, w, b, y + n * s->C, &mean);
        else rms_row(s->C, s->eps, x + n * s->C, y + n * s->C);
}

/* y = what `norm` made of x; g becomes the gradient of x; `sums` (2C) those of the weight and bias. */
static void norm_backward(const Block *s, const float *w, const float *b, int64_t rows, const float *x, float *y, float *g,
                          float *sums) {
    int64_t C = s->C;
    memset(sums, 0, 8 * C);
    for (int64_t n = 0; n < rows; n++, x += C, y += C, g += C)
        if (s->layer_norm) {
            float mean, r = layer_row(C, s->eps, x, w, b, y, &mean);
            layer_row_backward(C, x, w, mean, r, g, g, sums, sums + C);
        } else {
            float r = rms_row(C, s->eps, x, y);
            rms_row_backward(C, x, r, g, g);
        }
}

static void activate(const Block *s, int64_t N, const float *x, float *y) {
    if (s->activation == 0) gelu_alone(N, x, y);
    else if (s->activation == 1) gelu_exact_alone(N, x, y);
    else relu2_alone(N, x, y);
}

static void activate_backward(const Block *s, int64_t N, const float *x, float *g, float *y) {
    if (s->activation == 0) gelu_alone_backward(N, x, g, y);
    else if (s->activation == 1) gelu_exact_alone_backward(N, x, g, y);
    else relu2_alone_backward(N, x, g, y);
}

/* out = x + what a projection of `a` (rows, K) comes to, under dropout where `lines` are given; `spare` has (rows, C). */
static void project(const Block *s, int64_t first, int64_t rows, int64_t K, const float *a, Panels weight,
                    const float *bias, const int32_t *lines, const float *x, float *out, float *spare) {
    int64_t C = s->C;
    if (!lines) {
        memcpy(out, x, 4 * rows * C);
        add_bias(rows, C, bias, out);
        product(rows, C, K, a, weight, out, 1);
        return;
    }
    product(rows, C, K, a, weight, spare, 0);
    add_bias(rows, C, bias, spare);
    drop(s, lines, first, rows, spare, spare);
    for (int64_t i = 0; i < rows * C; i++) out[i] = x[i] + spare[i];
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Returns 0, or 1 without memory. */
int block(const Block *s) {
    int64_t C = s->C, M = s->M, T = s->T, D = C / s->H;
    Shape shape = {T, s->H, D, s->qk_eps, s->cos, s->sin};
    Kept keep = {s->least, s->scale};
    float *for_qkv = s->packed, *for_proj = for_qkv + C * PANEL * panels(3 * C), *for_up = for_proj + C * PANEL * panels(C);
    float *for_down = for_up + C * PANEL * panels(M);
    int failed = 0;
#pragma omp parallel
    {
        int64_t from, to;
        float *own = own_memory(larger(attention_room(T, D), ROWS * (2 * C + M)));
        if (!own) {
#pragma omp atomic write
            failed = 1;
        }
        Panels qkv_w = pack(C, 3 * C, s->qkv_weight, 1, for_qkv), proj_w = pack(C, C, s->proj_weight, 1, for_proj);
        Panels up_w = pack(C, M, s->up_weight, 1, for_up), down_w = pack(M, C, s->down_weight, 1, for_down);
#pragma omp barrier
        if (!failed) {
            share(tiles_of(s), &from, &to);
            for (int64_t tile = from; tile < to; tile++) {
                int64_t n = tile * ROWS, rows = rows_of(s, tile);
                norm(s, s->norm_1_weight, s->norm_1_bias, rows, s->x + n * C, own);
                product(rows, 3 * C, C, own, qkv_w, s->qkv + n * 3 * C, 0);
                add_bias(rows, 3 * C, s->qkv_bias, s->qkv + n * 3 * C);
            }
#pragma omp barrier
            share(s->B * s->H, &from, &to);
            for (int64_t bh = from; bh < to; bh++)
                attend(&shape, bh, s->attention_lines, s->attention_columns, keep, s->qkv, s->y, s->log_sum, own);
#pragma omp barrier
            float *normed = own, *spare = own + ROWS * C, *activated = own + 2 * ROWS * C;
            share(tiles_of(s), &from, &to);
            for (int64_t tile = from; tile < to; tile++) {
                int64_t n = tile * ROWS, rows = rows_of(s, tile);
                float *middle = s->middle + n * C, *hidden = s->hidden + n * M;
                project(s, n, rows, C, s->y + n * C, proj_w, s->proj_bias, s->proj_lines, s->x + n * C, middle, spare);
                norm(s, s->norm_2_weight, s->norm_2_bias, rows, middle, normed);
                product(rows, M, C, normed, up_w, hidden, 0);
                add_bias(rows, M, s->up_bias, hidden);
                activate(s, rows * M, hidden, activated);
                project(s, n, rows, M, activated, down_w, s->down_bias, s->down_lines, middle, s->out + n * C, spare);
            }
        }
        free(own);
    }
    return failed;
}

/* Tokens whose products are added up in one go in the gradient of a weight, and rows of it that a thread takes at once. */
#define DEPTH 256
#define OUTPUTS 96

/* dw (O, I) = g (N, O) transposed, times x (N, I), and db (O) the sums of g, by all threads; `own` has DEPTH * OUTPUTS. */
static void weight_gradient(int64_t N, int64_t O, int64_t I, const float *g, const float *x, float *dw, float *db,
                            float *own) {
#pragma omp for schedule(dynamic) nowait
    for (int64_t o = 0; o < O; o += OUTPUTS) {
        int64_t outputs = O - o < OUTPUTS ? O - o : OUTPUTS;
        float sums[OUTPUTS] = {0};
        for (int64_t n = 0; n < N; n += DEPTH) {
            int64_t depth = N - n < DEPTH ? N - n : DEPTH;
            for (int64_t k = 0; k < depth; k++) memcpy(own + k * outputs, g + (n + k) * O + o, 4 * outputs);
            multiply(outputs, I, depth, own, 1, outputs, x + n * I, I, dw + o * I, I, n > 0);
            if (db) for (int64_t k = 0; k < depth; k++)
                for (int64_t i = 0; i < outputs; i++) sums[i] += own[k * outputs + i];
        }
        if (db) memcpy(db + o, sums, 4 * outputs);
    }
}

/* Add up the tiles' parts of a norm's weight and bias. */
static void add_parts(int64_t tiles, int64_t C, const float *parts, float *dw, float *db) {
#pragma omp for nowait
    for (int64_t c = 0; c < C; c++) {
        float w = 0, b = 0;
        for (int64_t tile = 0; tile < tiles; tile++) w += parts[4 * tile * C + c], b += parts[4 * tile * C + C + c];
        if (dw) dw[c] = w;
        if (db) db[c] = b;
    }
}

/* The gradients, given that of what comes out; norms and activation are computed again. */
int block_backward(const Block *s) {
    int64_t C = s->C, M = s->M, T = s->T, D = C / s->H, N = s->B * T, tiles = tiles_of(s);
    Shape shape = {T, s->H, D, s->qk_eps, s->cos, s->sin};
    Kept keep = {s->least, s->scale};
    float *for_qkv = s->packed, *for_proj = for_qkv + 3 * C * PANEL * panels(C), *for_up = for_proj + C * PANEL * panels(C);
    float *for_down = for_up + M * PANEL * panels(C);
    const float *ddown = s->down_lines ? s->ddown : s->grad, *dproj = s->proj_lines ? s->dproj : s->dmiddle;
    int failed = 0;
#pragma omp parallel
    {
        int64_t from, to;
        float *own = own_memory(larger(attention_backward_room(T, D), DEPTH * OUTPUTS));
        if (!own) {
#pragma omp atomic write
            failed = 1;
        }
        Panels qkv_w = pack(3 * C, C, s->qkv_weight, 0, for_qkv), proj_w = pack(C, C, s->proj_weight, 0, for_proj);
        Panels up_w = pack(M, C, s->up_weight, 0, for_up), down_w = pack(C, M, s->down_weight, 0, for_down);
#pragma omp barrier
        if (!failed) {
            share(tiles, &from, &to);
            for (int64_t tile = from; tile < to; tile++) {
                int64_t n = tile * ROWS, rows = rows_of(s, tile);
                const float *g = s->grad + n * C;
                float *dmiddle = s->dmiddle + n * C, *dhidden = s->dhidden + n * M;
                if (s->down_lines) drop(s, s->down_lines, n, rows, g, s->ddown + n * C);
                product(rows, M, C, ddown + n * C, down_w, dhidden, 0);
                activate_backward(s, rows * M, s->hidden + n * M, dhidden, s->activated + n * M);
                product(rows, C, M, dhidden, up_w, dmiddle, 0);
                norm_backward(s, s->norm_2_weight, s->norm_2_bias, rows, s->middle + n * C, s->normed_2 + n * C, dmiddle,
                              s->parts + (4 * tile + 2) * C);
                for (int64_t i = 0; i < rows * C; i++) dmiddle[i] += g[i];
                if (s->proj_lines) drop(s, s->proj_lines, n, rows, dmiddle, s->dproj + n * C);
                product(rows, C, C, dproj + n * C, proj_w, s->dy + n * C, 0);
            }
#pragma omp barrier
            share(s->B * s->H, &from, &to);
            for (int64_t bh = from; bh < to; bh++)
                attend_backward(&shape, bh, s->attention_lines, s->attention_columns, keep, s->qkv, s->y, s->log_sum, s->dy,
                                s->dqkv, own);
#pragma omp barrier
            share(tiles, &from, &to);
            for (int64_t tile = from; tile < to; tile++) {
                int64_t n = tile * ROWS, rows = rows_of(s, tile);
                float *dx = s->dx + n * C;
                product(rows, C, 3 * C, s->dqkv + n * 3 * C, qkv_w, dx, 0);
                norm_backward(s, s->norm_1_weight, s->norm_1_bias, rows, s->x + n * C, s->normed_1 + n * C, dx,
                              s->parts + 4 * tile * C);
                for (int64_t i = 0; i < rows * C; i++) dx[i] += s->dmiddle[n * C + i];
            }
#pragma omp barrier
            /* The longest first, so that no thread is left with one at the end. */
            weight_gradient(N, C, M, ddown, s->activated, s->down_dweight, s->down_dbias, own);
            weight_gradient(N, M, C, s->dhidden, s->normed_2, s->up_dweight, s->up_dbias, own);
            weight_gradient(N, 3 * C, C, s->dqkv, s->normed_1, s->qkv_dweight, s->qkv_dbias, own);
            weight_gradient(N, C, C, dproj, s->y, s->proj_dweight, s->proj_dbias, own);
            if (s->layer_norm) {
                add_parts(tiles, C, s->parts, s->norm_1_dweight, s->norm_1_dbias);
                add_parts(tiles, C, s->parts + 2 * C, s->norm_2_dweight, s->norm_2_dbias);
            }
        }
        free(own);
    }
    return failed;
}
